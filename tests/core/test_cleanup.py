"""What fails on the way out: it is logged, and nothing is left."""

from __future__ import annotations

import contextlib
import gc
import logging
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, scoped_session

from tests.support.errors import AppError, Kill, raise_error, raise_kill
from tests.support.models import Book, Database, Note
from tests.support.wsgi import assert_nothing_left
from wsgi_dbsession import session_scope

if TYPE_CHECKING:
    Registry = scoped_session[Session]

pytestmark = pytest.mark.promise("cleanup")


def write(*registries: Registry) -> None:
    for registry in registries:
        registry.add(Note(text="lost"))
        registry.flush()


@pytest.mark.parametrize("how", ["doomed", "an error", "a failed commit"])
def test_a_rollback_that_fails_is_logged_and_nothing_is_left(
    two: tuple[Registry, Registry],
    postgres_database: Database,
    other_postgres_database: Database,
    caplog: pytest.LogCaptureFixture,
    how: str,
) -> None:
    """The connection is closed instead, and the other Sessions are rolled back all the same."""
    event.listen(two[0].session_factory, "after_rollback", raise_error)
    expected: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if how != "doomed":
        expected = pytest.raises(ValueError if how == "an error" else IntegrityError)

    with expected, session_scope(*two) as scope:
        write(*two)
        if how == "doomed":
            scope.doom()
        elif how == "an error":
            raise ValueError
        two[0].add(Book(author_id=7))

    assert scope.outcome == "rollback"
    assert_nothing_left(*two)
    assert postgres_database.notes() == other_postgres_database.notes() == []
    (record,) = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert record.name == "wsgi_dbsession"
    assert record.getMessage() == "rollback failed, closing the connection instead"
    assert record.exc_info is not None
    assert record.exc_info[0] is AppError


@pytest.mark.parametrize("registry_number", [0, 1])
def test_a_close_that_fails_leaves_no_session_in_the_registry(
    two: tuple[Registry, Registry],
    postgres_database: Database,
    caplog: pytest.LogCaptureFixture,
    registry_number: int,
) -> None:
    """scoped_session.remove() would keep it; the work itself is committed."""

    class Broken(Session):
        def close(self) -> None:
            raise AppError

    two[registry_number].session_factory.class_ = Broken
    with session_scope(*two) as scope:
        write(*two)

    assert scope.outcome == "commit"
    assert_nothing_left(*two)
    assert postgres_database.notes() == ["lost"]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_an_interrupted_rollback_propagates(two: tuple[Registry, Registry]) -> None:
    """Where there was no error before it; the other Session is rolled back all the same."""
    event.listen(two[0].session_factory, "after_rollback", raise_kill)
    with pytest.raises(Kill), session_scope(*two) as scope:
        write(*two)
        scope.doom()

    assert scope.outcome == "rollback"
    assert_nothing_left(*two)


@pytest.mark.promise("first error")
def test_the_first_error_beats_an_interrupted_rollback(two: tuple[Registry, Registry]) -> None:
    """The error of the block propagates."""
    event.listen(two[0].session_factory, "after_rollback", raise_kill)
    with pytest.raises(AppError), session_scope(*two):
        write(*two)
        raise AppError

    assert_nothing_left(*two)


@pytest.mark.parametrize("error", [None, AppError], ids=["", "after an error"])
def test_an_interrupted_close_propagates(
    two: tuple[Registry, Registry], error: type[Exception] | None
) -> None:
    """Where there was no error before it; the first interruption, if there are two."""

    class Broken(Session):
        def close(self) -> None:
            raise Kill(self.bind)

    for registry in two:
        registry.session_factory.class_ = Broken

    with pytest.raises(error or Kill) as caught, session_scope(*two):
        write(*two)
        if error is not None:
            raise error

    if error is None:
        assert caught.value.args == (two[0].session_factory.kw["bind"],)
    assert_nothing_left(*two)


def test_a_session_that_cannot_end_loses_its_connection(
    two: tuple[Registry, Registry],
    postgres_database: Database,
    other_postgres_database: Database,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is closed, and with it the database rolls back: it must not stay checked out."""

    class Broken(Session):
        def rollback(self) -> None:
            raise AppError

        def close(self) -> None:
            raise AppError

    two[0].session_factory.class_ = Broken
    with session_scope(*two) as scope:
        write(*two)
        scope.doom()

    assert_nothing_left(*two)
    assert postgres_database.notes() == other_postgres_database.notes() == []
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2


def test_a_connection_that_cannot_be_closed_hinders_no_other(
    two: tuple[Registry, Registry], other_postgres_database: Database
) -> None:
    """Everything fails for one Session, and the other is cleaned up all the same."""

    class Broken(Session):
        def rollback(self) -> None:
            raise AppError

        def invalidate(self) -> None:
            raise AppError

    two[0].session_factory.class_ = Broken
    with session_scope(*two) as scope:
        write(*two)
        scope.doom()

    assert_nothing_left(*two)
    assert other_postgres_database.notes() == []


@pytest.mark.parametrize("way", ["the Session", "the registry"])
def test_a_listener_that_begins_anew_at_each_end_comes_to_an_end(
    sqlite_registry: Registry, way: str
) -> None:
    """The error of the outcome names it, and the last transaction is left to the collector."""
    ends = 0

    @event.listens_for(sqlite_registry.session_factory, "after_transaction_end")
    def on_end(session: Session, transaction: object) -> None:
        nonlocal ends
        ends += 1
        if ends < 1000:
            (session if way == "the Session" else sqlite_registry()).begin()

    with (
        pytest.raises(RuntimeError, match="over 100 subsequent outcomes"),
        session_scope(sqlite_registry) as scope,
    ):
        sqlite_registry.begin()

    assert 100 < ends < 300
    assert scope.outcome == "commit"
    gc.collect()
