"""What the servers serve: a pool of five, requests that sleep, and what the sixth is told."""

from __future__ import annotations

import json
import logging
import os
import time
from typing import TYPE_CHECKING, Any

from sqlalchemy import create_engine, text
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import scoped_session, sessionmaker

from wsgi_dbsession import SessionMiddleware, current_scope
from wsgi_dbsession.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from _typeshed.wsgi import StartResponse, WSGIEnvironment

logged: list[str] = []


class Keep(logging.Handler):
    """Keeps what is logged, so that a client can ask for it."""

    def emit(self, record: logging.LogRecord) -> None:
        logged.append(record.getMessage())


logging.getLogger("wsgi_dbsession").addHandler(Keep())
engine = create_engine(os.environ["DATABASE_URL"], pool_size=5, max_overflow=0, pool_timeout=0.5)
Session = scoped_session(sessionmaker(engine), scopefunc=current_scope)
watch = Watch(Session, warn_after=0.1)


def sleep() -> None:
    Session.execute(text("SELECT 1"))
    deadline = time.monotonic() + 60
    while not logged_time_out() and time.monotonic() < deadline:
        time.sleep(0.02)


def logged_time_out() -> bool:
    return any(each.startswith("pool exhausted") for each in logged)


def sixth() -> dict[str, Any]:
    try:
        Session.execute(text("SELECT 1"))
    except PoolTimeoutError as error:
        return {"notes": error.__notes__}  # type: ignore[attr-defined]
    return {"notes": []}


def respond(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    path = environ["PATH_INFO"]
    found: object = None
    if path.startswith("/sleep/"):
        sleep()
    elif path == "/sixth":
        found = sixth()
    elif path == "/log":
        found = logged
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(found).encode()]


application = watch.board(SessionMiddleware(respond, Session, observers=[watch]), "/_db")
