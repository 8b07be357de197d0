"""What was rolled back with its savepoint is not lost when the Session is closed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError

from tests.core.discards import flush, insert_by_core, insert_by_text, read
from tests.support.errors import AppError
from tests.support.models import Note
from wsgi_dbsession import session_scope

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.orm import Session, scoped_session

    from tests.support.models import Database

    Registry = scoped_session[Session]
    Stocked = tuple[Registry, Database]
    Work = Callable[[Registry], None]

pytestmark = pytest.mark.promise("no silent loss", "discarded")


def lose_a_race(registry: Registry) -> None:
    """Get or create: the row is there already."""
    with pytest.raises(IntegrityError), registry.begin_nested():
        registry.add(Note(id=1, text="mine"))


def lose_a_race_by_text(registry: Registry) -> None:
    with pytest.raises(IntegrityError), registry.begin_nested():
        registry.execute(text("INSERT INTO note (id, text) VALUES (1, 'mine')"))


def undo(registry: Registry, write: Work) -> None:
    with pytest.raises(AppError), registry.begin_nested():
        write(registry)
        raise AppError


def undo_what_a_released_savepoint_wrote(registry: Registry) -> None:
    with pytest.raises(AppError), registry.begin_nested():
        with registry.begin_nested():
            flush(registry)
        raise AppError


def lock_and_give_up(registry: Registry) -> None:
    dialect = registry.get_bind().dialect.name
    with pytest.raises(AppError), registry.begin_nested():
        how = " FOR UPDATE SKIP LOCKED" if dialect == "postgresql" else ""
        registry.execute(text(f"SELECT text FROM note{how}"))
        raise AppError


def flush_nothing(registry: Registry) -> None:
    undo(registry, insert_by_text)
    note = registry.scalars(select(Note)).one()
    note.text = str(note.text)
    registry.flush()


HARMLESS: dict[str, Work] = {
    "a lost race": lose_a_race,
    "a lost race, textual": lose_a_race_by_text,
    "a flush": lambda registry: undo(registry, flush),
    "an insert by Core": lambda registry: undo(registry, insert_by_core),
    "a textual insert": lambda registry: undo(registry, insert_by_text),
    "a flush in a savepoint in it": undo_what_a_released_savepoint_wrote,
    "a lock": lock_and_give_up,
    "a flush of nothing": flush_nothing,
}


@pytest.mark.parametrize("work", HARMLESS.values(), ids=HARMLESS)
def test_a_savepoint_that_was_rolled_back_leaves_nothing_to_lose(
    stocked: Stocked, work: Work
) -> None:
    """The database may count what it took back, so a warning has to do."""
    registry, database = stocked

    with session_scope(registry) as scope:
        work(registry)
        read(registry)
        registry.remove()

    assert scope.outcome == "commit"
    assert database.notes() == ["there"]


def flush_in_a_savepoint(registry: Registry) -> None:
    with registry.begin_nested():
        flush(registry)


def flush_beside_what_is_undone(registry: Registry) -> None:
    with registry.begin_nested():
        flush(registry)
        undo(registry, flush)


def flush_after_what_is_undone(registry: Registry) -> None:
    undo(registry, flush)
    flush(registry)


def flush_before_what_is_undone(registry: Registry) -> None:
    flush(registry)
    undo(registry, insert_by_text)


LOST: dict[str, Work] = {
    "in a savepoint": flush_in_a_savepoint,
    "around one that is undone": flush_beside_what_is_undone,
    "after one that is undone": flush_after_what_is_undone,
    "before one that is undone": flush_before_what_is_undone,
}


# In sqlite3's legacy transactions, which begin after the savepoint, RELEASE commits.
@pytest.mark.parametrize(
    "stocked", ["BEGIN recipe", "autocommit=False", "postgres"], indirect=True
)
@pytest.mark.parametrize("work", LOST.values(), ids=LOST)
def test_what_other_savepoints_wrote_is_not_lost_in_silence(stocked: Stocked, work: Work) -> None:
    """What was flushed is known, whatever else is undone."""
    registry, database = stocked

    with (
        pytest.raises(RuntimeError, match="what it had written is lost"),
        session_scope(registry),
    ):
        work(registry)
        registry.remove()

    assert database.notes() == ["there"]


def test_postgresql_knows_of_each_savepoint(driver_registry: Registry) -> None:
    """A table stays locked by what is left."""
    with (
        pytest.raises(RuntimeError, match="what it had written is lost"),
        session_scope(driver_registry),
    ):
        insert_by_text(driver_registry)
        undo(driver_registry, insert_by_text)
        driver_registry.remove()


def test_sqlite_does_not(sqlite_registry: Registry, caplog: pytest.LogCaptureFixture) -> None:
    """It counts what was ever written, so there is a warning."""
    with session_scope(sqlite_registry):
        insert_by_text(sqlite_registry)
        undo(sqlite_registry, insert_by_text)
        sqlite_registry.remove()

    assert "closed a Session in an open transaction" in caplog.text


def test_the_next_transaction_begins_anew(sqlite_registry: Registry) -> None:
    """What was undone in one that has ended, does not count."""
    for end in (sqlite_registry.commit, sqlite_registry.rollback):
        with (
            pytest.raises(RuntimeError, match="what it had written is lost"),
            session_scope(sqlite_registry),
        ):
            undo(sqlite_registry, insert_by_text)
            end()
            insert_by_text(sqlite_registry)
            sqlite_registry.remove()
