"""A statement in a ``released()`` block is an error that names the block, and loses nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import select, text

from tests.support.models import Database, Note
from tests.support.wsgi import make_registry
from wsgi_dbsession import session_scope

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.orm import Session, scoped_session

    Registry = scoped_session[Session]
    Work = Callable[[Registry], object]

pytestmark = pytest.mark.promise("released")

REFUSED = "session_scope: cannot release connections at .*test_released_statements.py:"
NO_STATEMENT = "session_scope: no statement may run in the released.. block at .*/test_released_"


def checked_out(database: Database) -> int:
    pool: Any = database.engine.pool
    count: int = pool.checkedout()
    return count


@pytest.fixture
def stocked(database: Database, registry: Registry) -> Registry:
    """A registry over a database with one note."""
    with session_scope(registry):
        registry.add(Note(text="there"))
    return registry


def merge(registry: Registry) -> object:
    return registry.merge(Note(id=7))


def savepoint(registry: Registry) -> object:
    with registry.begin_nested():
        return registry.scalar(text("SELECT 1"))


def flush(registry: Registry) -> None:
    registry.add(Note(text="pending"))
    registry.flush()


def autoflush(registry: Registry) -> object:
    registry.add(Note(text="pending"))
    return registry.scalars(select(Note)).all()


def commit(registry: Registry) -> None:
    registry.add(Note(text="pending"))
    registry.commit()


STATEMENTS: dict[str, Work] = {
    "a select": lambda registry: registry.scalars(select(Note)).all(),
    "textual SQL": lambda registry: registry.scalar(text("SELECT 1")),
    "an object that is not loaded": lambda registry: registry.get(Note, 7),
    "an object that is merged": merge,
    "a Query": lambda registry: registry.query(Note).count(),
    "a statement in a savepoint": savepoint,
    "a flush": flush,
    "an autoflush": autoflush,
    "a commit of something": commit,
    "connection()": lambda registry: registry.connection(),
    "connection() with a bind": lambda registry: registry.connection(
        bind_arguments={"bind": registry.session_factory.kw["bind"]}
    ),
    "execute() with a bind": lambda registry: registry.execute(
        text("SELECT 1"), bind_arguments={"bind": registry.session_factory.kw["bind"]}
    ),
    "a bulk insert": lambda registry: registry.execute(Note.__table__.insert(), [{"text": "x"}]),  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("statement", STATEMENTS.values(), ids=STATEMENTS)
def test_a_statement_is_an_error_that_names_the_block(
    stocked: Registry, database: Database, statement: Work
) -> None:
    """It takes no connection, and what is pending stays so."""
    with session_scope(stocked) as scope:
        note = stocked.scalars(select(Note)).one()
        with scope.released():
            note.text = "changed"
            with pytest.raises(RuntimeError, match=NO_STATEMENT) as caught:
                statement(stocked)
            assert checked_out(database) == 0
        assert "in test_a_statement_is_an_error" in str(caught.value)
        assert "before or after the block" in str(caught.value)

    assert "changed" in database.notes()


def test_a_refresh_is_a_statement(stocked: Registry) -> None:
    """It discards what was changed, as ever, and loads it after the block."""
    with session_scope(stocked) as scope:
        note = stocked.scalars(select(Note)).one()
        with scope.released(), pytest.raises(RuntimeError, match=NO_STATEMENT):
            stocked.refresh(note)
        assert note.text == "there"


def test_an_expired_attribute_is_a_statement(stocked: Registry) -> None:
    """The block expires nothing, but a commit before it does."""
    with session_scope(stocked) as scope:
        note = stocked.scalars(select(Note)).one()
        stocked.commit()
        with scope.released(), pytest.raises(RuntimeError, match=NO_STATEMENT):
            _ = note.text
        assert note.text == "there"


def test_a_session_that_is_made_in_the_block_is_refused_too(
    sqlite_registry: Registry, sqlite_database: Database
) -> None:
    """Also one in the place of another; it works after the block."""
    other = make_registry(sqlite_database.engine)
    with session_scope(sqlite_registry, other) as scope:
        with scope.released():
            other.add(Note(text="new"))
            sqlite_registry.remove()
            for registry in (sqlite_registry, other):
                with pytest.raises(RuntimeError, match=NO_STATEMENT):
                    registry.scalar(text("SELECT 1"))
        assert sqlite_registry.scalar(text("SELECT 1")) == 1
        assert vars(other()).keys().isdisjoint({"get_bind", "flush", "connection"})

    assert sqlite_database.notes() == ["new"]


@pytest.mark.parametrize(
    "harmless",
    [
        pytest.param(lambda registry: registry.flush(), id="a flush of nothing"),
        pytest.param(lambda registry: registry.commit(), id="a commit of nothing"),
        pytest.param(lambda registry: registry.rollback(), id="a rollback"),
        pytest.param(lambda registry: registry.remove(), id="remove()"),
        pytest.param(lambda registry: registry.begin(), id="begin()"),
        pytest.param(lambda registry: registry.get(Note, 1), id="an object that is loaded"),
    ],
)
def test_what_sends_nothing_is_allowed(stocked: Registry, harmless: Work) -> None:
    """The block refuses statements, nothing else."""
    with session_scope(stocked) as scope:
        note = stocked.scalars(select(Note)).one()
        with scope.released():
            harmless(stocked)
        assert note.id == 1
        assert stocked.scalar(text("SELECT text FROM note")) == "there"


def test_an_independent_scope_works_in_the_block(stocked: Registry, database: Database) -> None:
    """It has its own Sessions: a progress bar, a lease that is renewed."""
    with session_scope(stocked) as scope:
        note = stocked.scalars(select(Note)).one()
        with scope.released():
            with session_scope(stocked) as inner:
                stocked.add(Note(text="progress"))
                stocked.flush()
                with pytest.raises(RuntimeError, match=REFUSED), inner.released():
                    pass
            assert database.notes() == ["progress", "there"]
            with pytest.raises(RuntimeError, match=NO_STATEMENT):
                stocked.scalar(text("SELECT 1"))
        note.text = "changed"

    assert database.notes() == ["changed", "progress"]
