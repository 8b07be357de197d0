"""Commits in the midst of a request, in each way there is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import text

from tests.retry.applications import TEXT
from tests.support.models import Note
from tests.support.wsgi import drive
from wsgi_dbsession import SessionMiddleware, current_scope, session_scope

if TYPE_CHECKING:
    from collections.abc import Iterable

    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from sqlalchemy.orm import Session, scoped_session


def _commit_plainly(session: scoped_session[Session]) -> None:
    session.add(Note(text="kept"))
    session.commit()


def _commit_in_block(session: scoped_session[Session]) -> None:
    with session_scope(session):
        session.add(Note(text="kept"))


def _commit_by_engine(session: scoped_session[Session]) -> None:
    engine: Any = session.get_bind()
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO note (text) VALUES ('kept')"))


def _commit_in_request(session: scoped_session[Session]) -> None:
    def inner(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        session.add(Note(text="kept"))
        start_response("200 OK", TEXT)
        return [b""]

    # With a copy of the environ, as Pyramid's wsgiapp2 makes one.
    environ = current_scope().environ
    assert environ is not None
    drive(SessionMiddleware(inner, session), **environ)


def _commit_by_itself(session: scoped_session[Session]) -> None:
    connection = session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
    connection.execute(text("INSERT INTO note (text) VALUES ('kept')"))


COMMITS = {
    "the application": _commit_plainly,
    "an independent block": _commit_in_block,
    "an engine": _commit_by_engine,
    "a request in the request": _commit_in_request,
    "AUTOCOMMIT": _commit_by_itself,
}
