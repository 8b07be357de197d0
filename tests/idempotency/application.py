"""The application that the servers of ``test_servers`` run: a shop in Flask."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import flask
from sqlalchemy import create_engine, text
from sqlalchemy.orm import scoped_session, sessionmaker

from tests.idempotency.shop import KEYS, Note
from wsgi_dbsession import SessionMiddleware, current_scope
from wsgi_dbsession.idempotency import Idempotency

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

engine = create_engine(os.environ["DATABASE_URL"], pool_size=16, pool_timeout=60)
Session = scoped_session(sessionmaker(engine), scopefunc=current_scope)
app = flask.Flask(__name__)


def token_of(environ: WSGIEnvironment) -> str | None:
    """Return the credentials: only their digest is stored."""
    return environ.get("HTTP_AUTHORIZATION")


app.wsgi_app = SessionMiddleware(  # type: ignore[method-assign]
    Idempotency(app.wsgi_app, Session, KEYS, principal=token_of), Session
)


@app.post("/orders")
def order() -> tuple[dict[str, int], int]:
    """Add a note, and take some time over it."""
    note = Note(text=flask.request.get_data(as_text=True))
    Session.add(note)
    Session.flush()  # a textual statement does so from SQLAlchemy 2.1 on only
    Session.execute(text("SELECT pg_sleep(0.05)"))
    return {"number": note.id, "worker": os.getpid()}, 201


@app.post("/crash")
def crash() -> tuple[str, int]:
    """Add a note, and take the worker down, once."""
    Session.add(Note(text="crash"))
    Session.flush()
    try:
        Path(os.environ["CRASHED"]).touch(exist_ok=False)
    except FileExistsError:
        return "survived", 201
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("the worker is dead")
