"""A hook that was registered inside of a savepoint is dropped if that one is rolled back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError

from tests.support.errors import AppError
from tests.support.models import Author, Database, Note
from tests.support.wsgi import make_registry
from wsgi_dbsession import session_scope

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.orm import Session, scoped_session

    from wsgi_dbsession import Scope

    Registry = scoped_session[Session]

pytestmark = pytest.mark.promise("savepoints")


@pytest.mark.parametrize("rolled_back", [True, False])
def test_a_hook_shares_the_fate_of_its_savepoint(
    database: Database, registry: Registry, rolled_back: bool
) -> None:
    """Those before and after it are called in any case."""
    calls: list[str] = []
    with session_scope(registry) as scope:
        scope.on_commit(calls.append, "before")
        savepoint = registry.begin_nested()
        registry.add(Note(text="inside"))
        scope.on_commit(calls.append, "inside")
        scope.on_rollback(calls.append, "for a rollback")
        if rolled_back:
            savepoint.rollback()
        else:
            savepoint.commit()
        scope.on_commit(calls.append, "after")

    assert calls == (["before", "after"] if rolled_back else ["before", "inside", "after"])
    assert database.notes() == ([] if rolled_back else ["inside"])


@pytest.mark.parametrize(
    ("inner", "outer", "called"),
    [
        ("release", "release", ["outer", "inner"]),
        ("rollback", "release", ["outer"]),
        ("release", "rollback", []),
        ("rollback", "rollback", []),
    ],
)
def test_a_hook_shares_the_fate_of_each_savepoint_around_it(
    sqlite_registry: Registry, inner: str, outer: str, called: list[str]
) -> None:
    """A released savepoint goes with the one around it."""
    calls: list[str] = []

    def nest(how: str, work: Callable[[], object]) -> None:
        with sqlite_registry.begin_nested() as savepoint:
            sqlite_registry.add(Note())
            work()
            if how == "rollback":
                savepoint.rollback()

    with session_scope(sqlite_registry) as scope:

        def outermost() -> None:
            scope.on_commit(calls.append, "outer")
            nest(inner, lambda: scope.on_commit(calls.append, "inner"))

        nest(outer, outermost)

    assert calls == called


def fail_in_python(registry: Registry) -> None:
    raise AppError


def fail_in_a_flush(registry: Registry) -> None:
    registry.add_all([Author(id=1), Author(id=1)])
    registry.flush()


def fail_in_the_release(registry: Registry) -> None:
    registry.add_all([Author(id=1), Author(id=1)])


@pytest.mark.parametrize("fail", [fail_in_python, fail_in_a_flush, fail_in_the_release])
@pytest.mark.filterwarnings("ignore:New instance .* conflicts")
def test_a_savepoint_that_fails_drops_its_hooks(
    registry: Registry, fail: Callable[[Registry], None]
) -> None:
    """The usual way: an error is caught around it, and the request goes on."""
    calls: list[str] = []
    with session_scope(registry) as scope:
        with pytest.raises((AppError, IntegrityError)), registry.begin_nested():
            scope.on_commit(calls.append, "inside")
            fail(registry)
        scope.on_commit(calls.append, "after")

    assert calls == ["after"]


def test_a_rollback_of_everything_drops_them(sqlite_registry: Registry) -> None:
    """Session.rollback() rolls back the savepoints, too."""
    calls: list[str] = []
    with session_scope(sqlite_registry) as scope:
        sqlite_registry.add(Note())
        scope.on_commit(calls.append, "before")
        sqlite_registry.begin_nested()
        scope.on_commit(calls.append, "inside")
        sqlite_registry.rollback()

    assert calls == ["before"]


def test_an_open_savepoint_is_released_by_the_commit(
    sqlite_database: Database, sqlite_registry: Registry
) -> None:
    """And its hooks are called."""
    calls: list[str] = []
    with session_scope(sqlite_registry) as scope:
        sqlite_registry.begin_nested()
        sqlite_registry.add(Note(text="a"))
        scope.on_commit(calls.append, "inside")

    assert calls == ["inside"]
    assert sqlite_database.notes() == ["a"]


@pytest.mark.parametrize("outcome", ["commit", "rollback"])
def test_an_open_savepoint_does_not_keep_hooks_from_the_rollback(
    sqlite_registry: Registry, outcome: str
) -> None:
    """A doomed scope rolls back its savepoint with the rest, and tells so."""
    calls: list[str] = []
    with session_scope(sqlite_registry) as scope:
        scope.on_rollback(calls.append, "before")
        sqlite_registry.begin_nested()
        scope.on_commit(calls.append, "commit")
        if outcome == "rollback":
            scope.doom()

    assert calls == (["commit"] if outcome == "commit" else ["before"])


def test_only_the_savepoint_of_its_own_scope_counts(
    postgres_database: Database, postgres_registry: Registry
) -> None:
    """A block inside of a savepoint is a unit of work of its own."""
    calls: list[str] = []

    def independent() -> Scope:
        with session_scope(postgres_registry) as inner:
            inner.on_commit(calls.append, "inner")
            postgres_registry.add(Note(text="kept"))
            return inner

    with session_scope(postgres_registry) as scope:
        savepoint = postgres_registry.begin_nested()
        assert independent().outcome == "commit"
        scope.on_commit(calls.append, "outer")
        savepoint.rollback()

    assert calls == ["inner"]
    assert postgres_database.notes() == ["kept"]


def test_the_savepoint_of_any_session_counts(two: tuple[Registry, Registry]) -> None:
    """With two registries, a hook belongs to the savepoints of both."""
    calls: list[str] = []
    first, second = two
    with session_scope(first, second) as scope:
        one = first.begin_nested()
        scope.on_commit(calls.append, "one")
        other = second.begin_nested()
        scope.on_commit(calls.append, "both")
        other.rollback()
        one.commit()

    assert calls == ["one"]


def test_a_savepoint_that_is_used_again_is_another(sqlite_database: Database) -> None:
    """A loop over savepoints keeps the hooks of those that were released."""
    registry = make_registry(sqlite_database.engine)
    calls: list[int] = []
    with session_scope(registry) as scope:
        for number in range(6):
            with registry.begin_nested() as savepoint:
                registry.add(Note(text=str(number)))
                scope.on_commit(calls.append, number)
                if number % 2:
                    savepoint.rollback()

    assert calls == [0, 2, 4]
    assert sqlite_database.notes() == ["0", "2", "4"]


@pytest.mark.filterwarnings("ignore:New instance .* conflicts")
def test_a_flush_that_fails_outside_of_a_savepoint_drops_none(sqlite_registry: Registry) -> None:
    """The whole scope is rolled back then, and its hooks learn of it."""
    calls: list[str] = []
    with pytest.raises(IntegrityError), session_scope(sqlite_registry) as scope:
        scope.on_rollback(calls.append, "before")
        with sqlite_registry.begin_nested():
            scope.on_rollback(calls.append, "released")
        fail_in_a_flush(sqlite_registry)

    assert calls == ["before", "released"]


def test_a_savepoint_that_a_listener_of_the_flush_makes_is_in_the_one_around_it(
    sqlite_registry: Registry,
) -> None:
    """The flush has a transaction of its own between the two."""
    calls: list[str] = []

    with session_scope(sqlite_registry) as scope:

        @event.listens_for(sqlite_registry(), "after_flush")
        def on_flush(session: Session, context: object) -> None:
            with session.begin_nested():
                scope.on_commit(calls.append, "in the flush")

        savepoint = sqlite_registry.begin_nested()
        sqlite_registry.add(Note(text="a"))
        sqlite_registry.flush()
        savepoint.rollback()

    assert calls == []


def test_a_session_that_no_scope_keeps_rolls_back_a_savepoint(
    database: Database, registry: Registry
) -> None:
    """It has no hooks, and its factory is the registry's."""
    with session_scope(registry), registry.session_factory() as own:
        own.begin_nested().rollback()
        own.add(Note(text="kept"))
        own.commit()

    assert database.notes() == ["kept"]
