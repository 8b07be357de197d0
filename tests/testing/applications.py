"""Applications, and looks at what they left, for the tests of isolation."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import select
from werkzeug.test import Client

from tests.support.models import Note
from wsgi_dbsession import SessionMiddleware, session_scope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import TypeAlias

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from sqlalchemy.orm import Session as SQLAlchemySession
    from sqlalchemy.orm import scoped_session

Registry: TypeAlias = "scoped_session[SQLAlchemySession]"


def make_app(
    work: Callable[[], object], *registries: Registry, status: str = "200 OK", **options: Any
) -> WSGIApplication:
    """Make an application that does some work and answers with a status."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        work()
        start_response(status, [("Content-Type", "text/plain")])
        return [b"done"]

    return SessionMiddleware(app, *registries, **options)


def request(app: WSGIApplication, method: str = "POST") -> int:
    return Client(app).open("/work", method=method, buffered=True).status_code


def notes(registry: Registry) -> list[str]:
    """Return what a scope of its own sees, as a test would look."""
    with session_scope(registry):
        return list(registry.scalars(select(Note.text).order_by(Note.id)))


def add(registry: Registry, *texts: str) -> None:
    with session_scope(registry):
        registry.add_all(Note(text=each) for each in texts)


@contextlib.contextmanager
def problem(*parts: str) -> Iterator[None]:
    """Expect the report of an isolation, with these words in it."""
    with pytest.raises(RuntimeError) as caught:
        yield
    for part in parts:
        assert part in str(caught.value)


def use_savepoints(registry: Registry) -> None:
    with registry.begin_nested():
        registry.add(Note(text="released"))
    savepoint = registry.begin_nested()
    registry.add(Note(text="given up"))
    registry.flush()
    savepoint.rollback()
    registry.begin_nested()
    registry.add(Note(text="left open"))
