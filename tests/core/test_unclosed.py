"""Unclosed responses leave nothing."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session, scoped_session

from tests.support.errors import AppError
from tests.support.moments import MOMENTS, flush_note
from tests.support.wsgi import (
    BLOCK_BY_BLOCK,
    BODIES,
    Program,
    Server,
    assert_nothing_left,
    make_environ,
)
from wsgi_dbsession import Scope, SessionMiddleware

if TYPE_CHECKING:
    from tests.support.models import Database
    from wsgi_dbsession._moment import CommitOn

pytestmark = pytest.mark.promise("unclosed")


@pytest.mark.parametrize("body", BODIES)
def test_a_request_is_no_cycle(sqlite_registry: scoped_session[Session], body: str) -> None:
    """Its scope is gone with the response, without a collection."""
    program = Program(lambda: flush_note(sqlite_registry, "a"))
    environ = make_environ()
    gc.disable()
    try:
        Server().run(SessionMiddleware(BODIES[body](program), sqlite_registry), environ)
        scope = weakref.ref(environ.pop("wsgi_dbsession.scope"))

        assert scope() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("commit_on", MOMENTS)
@pytest.mark.parametrize("body", BLOCK_BY_BLOCK)
@pytest.mark.parametrize("asked", [0, 1])
def test_an_unclosed_response_leaves_nothing(
    sqlite_database: Database,
    sqlite_registry: scoped_session[Session],
    body: str,
    commit_on: CommitOn,
    asked: int,
) -> None:
    """Once it is unreachable, its Session and connection are gone, without a collection."""
    program = Program(
        early=lambda: flush_note(sqlite_registry, "early"),
        late=lambda: flush_note(sqlite_registry, "late"),
    )
    app = SessionMiddleware(BODIES[body](program), sqlite_registry, commit_on=commit_on)
    environ = make_environ()
    gc.disable()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            response = iter(app(environ, Server().start_response))
            for _ in range(asked):
                next(response)
            del response

        assert_nothing_left(sqlite_registry)
    finally:
        gc.enable()
    # A generator that was not started has done nothing.
    decided = commit_on == "headers" or (
        commit_on == "close" and body == "generator application" and not asked
    )
    assert [each.category for each in caught] == ([] if decided else [ResourceWarning])

    committed = ["early"] if commit_on == "headers" else []
    assert sqlite_database.notes() == committed
    assert environ["wsgi_dbsession.scope"].environ is None


def test_a_caught_error_keeps_no_unclosed_response(
    sqlite_registry: scoped_session[Session],
) -> None:
    """One that lives on in a cycle keeps the frames of those who called; not the response."""

    def early() -> None:
        flush_note(sqlite_registry, "a")
        try:
            raise AppError
        except AppError as error:
            kept = error  # the error has this frame, and this frame has the error
        assert kept is not None

    app = SessionMiddleware(BODIES["unsized generator"](Program(early)), sqlite_registry)
    gc.disable()
    try:
        with pytest.warns(ResourceWarning, match="GET /: response dropped without close"):
            next(iter(app(make_environ(), Server().start_response)))

        assert_nothing_left(sqlite_registry)
    finally:
        gc.enable()


def test_a_thousand_unclosed_responses_leave_no_memory(
    sqlite_registry: scoped_session[Session],
) -> None:
    """Neither scopes nor Sessions pile up."""
    program = Program(early=lambda: sqlite_registry.scalar(text("SELECT 1")))
    app = SessionMiddleware(BODIES["unsized generator"](program), sqlite_registry)

    def alive() -> int:
        gc.collect()
        kinds = (Scope, Session)
        return sum(issubclass(type(each), kinds) for each in gc.get_objects())

    before = alive()
    for _ in range(1000):
        with pytest.warns(ResourceWarning):
            next(iter(app(make_environ(), Server().start_response)))

    assert alive() == before


def test_an_unclosed_response_in_a_cycle_is_collected(
    sqlite_database: Database, sqlite_registry: scoped_session[Session]
) -> None:
    """Where something made it reachable from itself, a collection ends it."""
    program = Program(early=lambda: flush_note(sqlite_registry, "a"))
    app = SessionMiddleware(BODIES["unsized generator"](program), sqlite_registry)
    cycle: list[object] = [response := iter(app(make_environ(), Server().start_response))]
    cycle.append(cycle)
    next(response)

    del response, cycle
    with pytest.warns(ResourceWarning):
        gc.collect()

    assert_nothing_left(sqlite_registry)
    assert sqlite_database.notes() == []
