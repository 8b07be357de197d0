"""No framework: ``python bare_wsgi.py`` serves notes on http://127.0.0.1:8000/."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from urllib.parse import parse_qs
from wsgiref.simple_server import make_server

from sqlalchemy import create_engine, text
from sqlalchemy.orm import scoped_session, sessionmaker

from wsgi_dbsession import SessionMiddleware, current_scope

if TYPE_CHECKING:
    from collections.abc import Iterable

    from _typeshed.wsgi import StartResponse, WSGIEnvironment

engine = create_engine(os.environ.get("DATABASE_URL", "sqlite:///notes.db"), pool_pre_ping=True)
Session = scoped_session(sessionmaker(engine), scopefunc=current_scope)


def notes(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Textual SQL is committed as anything else is: nothing has to be marked as changed."""
    status, body = "200 OK", ""
    if environ["REQUEST_METHOD"] == "POST":
        form = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0)).decode()
        note = parse_qs(form).get("text", [""])[0]
        Session.execute(text("INSERT INTO note (text) VALUES (:text)"), {"text": note})
        status, body = "201 Created", "saved"  # committed before the client sees this
        if not note:
            status, body = "422 Unprocessable Content", "a note needs a text"  # rolled back
    else:
        body = "\n".join(Session.scalars(text("SELECT text FROM note")))
    start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
    return [body.encode()]


app = SessionMiddleware(notes, Session)

if __name__ == "__main__":
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE IF NOT EXISTS note (text TEXT)"))
    make_server("127.0.0.1", int(os.environ.get("PORT", "8000")), app).serve_forever()
