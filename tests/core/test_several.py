"""Several registries share one outcome."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError
from sqlalchemy.orm.exc import FlushError

from tests.support.models import Book, Database, Note
from wsgi_dbsession import session_scope

if TYPE_CHECKING:
    from sqlalchemy.orm import Session, scoped_session

    Registry = scoped_session[Session]

pytestmark = pytest.mark.promise("several registries")


def test_several_registries_share_the_commit(
    two: tuple[Registry, Registry], postgres_database: Database, other_postgres_database: Database
) -> None:
    """Both are committed."""
    first, second = two
    with session_scope(first, second):
        first.add(Note(text="first"))
        second.add(Note(text="second"))

    assert postgres_database.notes() == ["first"]
    assert other_postgres_database.notes() == ["second"]


@pytest.mark.parametrize("used", [0, 1])
def test_a_registry_that_was_not_used_does_not_matter(
    two: tuple[Registry, Registry],
    postgres_database: Database,
    other_postgres_database: Database,
    used: int,
) -> None:
    """Whether there is a Session or not, the other one is committed."""
    with session_scope(*two):
        two[used].add(Note(text="a"))
    with session_scope(*two):
        two[used].add(Note(text="b"))
        two[1 - used]()

    notes = [postgres_database.notes(), other_postgres_database.notes()]
    assert notes[used] == ["a", "b"]
    assert notes[1 - used] == []


@pytest.mark.parametrize("broken", [0, 1])
def test_a_flush_that_fails_rolls_all_back(
    two: tuple[Registry, Registry],
    postgres_database: Database,
    other_postgres_database: Database,
    broken: int,
) -> None:
    """All are flushed before the first is committed."""
    with pytest.raises(DBAPIError), session_scope(*two):
        two[1 - broken].add(Note(text="a"))
        two[broken].add(Note(text="\0"))  # PostgreSQL has no such text

    assert postgres_database.notes() == []
    assert other_postgres_database.notes() == []


@pytest.mark.parametrize("of", [0, 1], ids=["another Session", "its own Session"])
def test_what_a_listener_of_a_flush_adds_is_flushed_before_the_first_commit(
    two: tuple[Registry, Registry], postgres_database: Database, of: int
) -> None:
    """Even if the Session to which it adds something has been flushed before."""
    first, second = two
    added: list[Note] = []

    @event.listens_for(two[of].session_factory, "after_flush")
    def on_flush(*_: object) -> None:
        if not added:
            added.append(Note(text="\0"))
            second.add(added[0])

    with pytest.raises(DBAPIError), session_scope(first, second) as scope:
        second.add(Note(text="b"))
        first.add(Note(text="a"))

    assert scope.reason == "rolled back"
    assert postgres_database.notes() == []


def test_a_listener_that_adds_something_at_each_flush_ends_in_an_error(
    two: tuple[Registry, Registry], postgres_database: Database, other_postgres_database: Database
) -> None:
    """It is SQLAlchemy's, and none of them is committed."""
    first, second = two
    event.listen(
        first.session_factory, "after_flush", lambda session, _: session.add(Note(text="late"))
    )

    with pytest.raises(FlushError, match="Over 100"), session_scope(first, second):
        first.add(Note(text="a"))
        second.add(Note(text="b"))

    assert postgres_database.notes() == other_postgres_database.notes() == []


@pytest.mark.parametrize("broken", [0, 1])
def test_a_swallowed_failure_is_found_before_the_first_commit(
    two: tuple[Registry, Registry],
    postgres_database: Database,
    other_postgres_database: Database,
    broken: int,
) -> None:
    """A flush that failed before, and whose error was caught, rolls all back, too."""
    with pytest.raises(PendingRollbackError, match="cannot commit"), session_scope(*two):
        two[1 - broken].add(Note(text="a"))
        two[broken].add(Note(text="\0"))
        with contextlib.suppress(DBAPIError):
            two[broken].flush()

    assert postgres_database.notes() == []
    assert other_postgres_database.notes() == []


def test_a_first_commit_that_fails_rolls_all_back(
    two: tuple[Registry, Registry], postgres_database: Database, other_postgres_database: Database
) -> None:
    """The others have not been committed by then."""
    first, second = two
    with pytest.raises(IntegrityError), session_scope(first, second):
        first.add(Book(author_id=7))
        second.add(Note(text="a"))

    assert other_postgres_database.notes() == []


def test_registries_are_committed_in_the_order_of_their_adoption(
    two: tuple[Registry, Registry], other_postgres_database: Database
) -> None:
    """The application may use them in another one."""
    first, second = two
    with pytest.raises(IntegrityError), session_scope(first, second) as scope:
        second.add(Note(text="a"))
        first.add(Book(author_id=7))  # its commit fails, and comes first

    assert scope.reason == "rolled back"
    assert other_postgres_database.notes() == []


def test_a_later_commit_that_fails_cannot_take_back_an_earlier_one(
    two: tuple[Registry, Registry], postgres_database: Database, other_postgres_database: Database
) -> None:
    """That is what two-phase commits are for; the failure is not hidden."""
    first, second = two
    with pytest.raises(IntegrityError), session_scope(first, second) as scope:
        first.add(Note(text="a"))
        second.add(Book(author_id=7))

    assert (scope.outcome, scope.reason) == ("partial", "partly committed")
    assert postgres_database.notes() == ["a"]


@pytest.mark.parametrize("error", [None, ZeroDivisionError()], ids=["doomed", "error"])
def test_a_listener_of_the_rollback_asks_for_another_session(
    two: tuple[Registry, Registry], sqlite_registry: Registry, error: Exception | None
) -> None:
    """Each Session is rolled back all the same."""
    first, second = two
    asked: list[int] = []

    @event.listens_for(first.session_factory, "after_soft_rollback")
    def on_rollback(session: Session, transaction: Any) -> None:
        asked.append(sqlite_registry.scalars(text("SELECT 1")).one())

    expected = contextlib.nullcontext() if error is None else pytest.raises(ZeroDivisionError)
    with expected, session_scope(first, second, sqlite_registry) as scope:
        for each in two:
            each.add(Note(text="a"))
            each.flush()
        scope.doom()
        if error is not None:
            raise error

    assert asked
    assert scope.outcome == "rollback"
