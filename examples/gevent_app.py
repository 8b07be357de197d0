"""gevent: ``python gevent_app.py`` serves on http://127.0.0.1:8000/, one greenlet a request.

``/events`` is a stream of Server-Sent Events. It commits before the first byte is sent, and opens
a block for each later look at the database, so a thousand readers hold no connection.
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()  # before anything else is imported

import os
import time
from typing import TYPE_CHECKING

from gevent.pywsgi import WSGIServer
from sqlalchemy import create_engine, text
from sqlalchemy.orm import scoped_session, sessionmaker

from wsgi_dbsession import SessionMiddleware, current_scope, session_scope

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIEnvironment

engine = create_engine(os.environ.get("DATABASE_URL", "sqlite:///hits.db"), pool_pre_ping=True)
Session = scoped_session(sessionmaker(engine), scopefunc=current_scope)


def hits(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Count the visits of every page."""
    if environ["PATH_INFO"] == "/events":
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        return events()
    Session.execute(text("INSERT INTO hit VALUES (:path)"), {"path": environ["PATH_INFO"]})
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"counted"]


def events() -> Iterator[bytes]:
    for _ in range(3):
        with session_scope(Session):  # a connection for the time of the block
            count = Session.scalar(text("SELECT count(*) FROM hit"))
        yield f"data: {count} hits\n\n".encode()
        time.sleep(0.1)  # gevent's: other greenlets run meanwhile


app = SessionMiddleware(hits, Session, commit_on="headers")

if __name__ == "__main__":
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE IF NOT EXISTS hit (path TEXT)"))
    WSGIServer(("127.0.0.1", int(os.environ.get("PORT", "8000"))), app).serve_forever()
