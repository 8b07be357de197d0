"""Whatever writes counts as a write, and whatever only reads as a read."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Engine, create_engine, event, func, insert, select, text, update
from sqlalchemy.exc import DBAPIError

from tests.support.models import Base, Database, Note, make_engine
from tests.support.wsgi import make_registry
from tests.testing.applications import add, notes, problem
from wsgi_dbsession import current_scope, session_scope
from wsgi_dbsession.testing import isolate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import TypeAlias

    from tests.testing.applications import Registry

    Work: TypeAlias = Callable[[Registry], object]


@pytest.fixture
def registry(driver_database: Database) -> Registry:
    """A registry that uses each of the drivers."""
    return make_registry(driver_database.engine)


def _on_a_cursor(registry: Registry) -> None:
    cursor = registry.connection().connection.cursor()
    cursor.execute("INSERT INTO note (text) VALUES ('written')")
    cursor.close()


def _in_a_common_table_expression(registry: Registry) -> None:
    added = insert(Note).values(text="written").returning(Note.id).cte()
    registry.execute(select(added.c.id)).all()


def _by_a_function(registry: Registry) -> None:
    registry.scalar(select(func.write("written")))


def _in_an_explanation(registry: Registry) -> None:
    registry.execute(text("EXPLAIN ANALYZE INSERT INTO note (text) VALUES ('written')"))


FUNCTION = """
    CREATE FUNCTION write(text) RETURNS integer LANGUAGE sql
    AS 'INSERT INTO note (text) VALUES ($1) RETURNING id'
"""


def _make_function(registry: Registry) -> None:
    with session_scope(registry):
        if registry.get_bind().dialect.name == "postgresql":
            registry.execute(text(FUNCTION))


WRITES = [
    pytest.param("sqlite", _on_a_cursor, id="a cursor of sqlite3"),
    *(
        pytest.param(driver, work, id=f"{name}, {driver}")
        for driver in ("psycopg", "psycopg2", "pg8000")
        for name, work in (
            ("a cursor", _on_a_cursor),
            ("a common table expression", _in_a_common_table_expression),
            ("a function", _by_a_function),
            ("EXPLAIN ANALYZE", _in_an_explanation),
        )
    ),
]
each_write = pytest.mark.parametrize(
    ("driver_database", "write"), WRITES, indirect=["driver_database"]
)


@each_write
@pytest.mark.parametrize("read_before", [False, True], ids=["at once", "after a read"])
def test_what_was_written_is_rolled_back(
    registry: Registry, write: Work, read_before: bool
) -> None:
    """Although another transaction has written and committed meanwhile, which is reported."""
    with problem("has undone what"), isolate(registry):
        _make_function(registry)
        with session_scope(registry) as scope:
            if read_before:
                registry.scalars(select(Note)).all()
            write(registry)
            add(registry, "audit")
            scope.doom()
        assert notes(registry) == []


@each_write
def test_what_was_written_in_a_savepoint_is_rolled_back_with_it(
    registry: Registry, write: Work
) -> None:
    """And what was written around it stays."""
    with isolate(registry):
        _make_function(registry)
        with session_scope(registry):
            write(registry)
            savepoint = registry.begin_nested()
            write(registry)
            add(registry, "inner")
            savepoint.commit()
            savepoint = registry.begin_nested()
            write(registry)
            savepoint.rollback()
        assert notes(registry) == ["written", "written", "inner"]


@each_write
def test_what_was_written_meets_the_deferred_constraints(registry: Registry, write: Work) -> None:
    """So the commit of a transaction that wrote in such a way is checked."""
    with isolate(registry):
        _make_function(registry)
        with session_scope(registry):
            if registry.get_bind().dialect.name == "postgresql":
                registry.execute(
                    text("ALTER TABLE note ADD UNIQUE (text) DEFERRABLE INITIALLY DEFERRED")
                )
            else:
                registry.execute(
                    text(
                        "CREATE TRIGGER refers AFTER INSERT ON note BEGIN "
                        "INSERT INTO book (author_id) VALUES (7); END"
                    )
                )
        with pytest.raises(Exception, match=r"(?i)constraint"), session_scope(registry):
            write(registry)
            write(registry)
        assert notes(registry) == []


def _look(registry: Registry) -> None:
    registry.scalars(select(Note)).all()


def _lock(registry: Registry) -> None:
    registry.scalars(select(Note).with_for_update()).all()


def _call(registry: Registry) -> None:
    registry.scalar(select(func.coalesce(func.max(Note.id), 0)))


def _with(registry: Registry) -> None:
    registry.execute(text("/* x */ WITH one AS (SELECT 1) SELECT * FROM one"))


def _take_the_connection(registry: Registry) -> None:
    cursor = registry.connection().connection.cursor()
    cursor.execute("SELECT * FROM note")
    cursor.fetchall()
    cursor.close()


def _update_nothing(registry: Registry) -> None:
    registry.execute(update(Note).where(Note.id == -1).values(text="x"))


def _delete_nothing(registry: Registry) -> None:
    registry.execute(text("DELETE FROM note WHERE id = -1"))


def _insert_nothing(registry: Registry) -> None:
    registry.execute(text("INSERT INTO note (text) SELECT text FROM note WHERE id = -1"))


def _set_something(registry: Registry) -> None:
    on_postgresql = registry.get_bind().dialect.name == "postgresql"
    registry.execute(text("SET statement_timeout = '9s'" if on_postgresql else _CACHE))


def _lock_the_table(registry: Registry) -> None:
    if registry.get_bind().dialect.name == "postgresql":
        registry.execute(text("LOCK TABLE note IN SHARE MODE"))


def _use_a_cursor(registry: Registry) -> None:
    if registry.get_bind().dialect.name == "postgresql":
        registry.execute(text("DECLARE one CURSOR FOR SELECT * FROM note"))
        registry.execute(text("FETCH ALL FROM one")).all()
        registry.execute(text("CLOSE one"))


_CACHE = "PRAGMA cache_size = 100"

each_read = pytest.mark.parametrize(
    "read",
    [
        pytest.param(_look, id="SELECT"),
        pytest.param(_lock, id="SELECT FOR UPDATE"),
        pytest.param(_call, id="a function"),
        pytest.param(_with, id="WITH"),
        pytest.param(_take_the_connection, id="a cursor"),
        pytest.param(_update_nothing, id="UPDATE of no row"),
        pytest.param(_delete_nothing, id="DELETE of no row"),
        pytest.param(_insert_nothing, id="INSERT of no row"),
        pytest.param(_set_something, id="SET or PRAGMA"),
        pytest.param(_lock_the_table, id="LOCK TABLE"),
        pytest.param(_use_a_cursor, id="DECLARE, FETCH and CLOSE"),
    ],
)


@each_read
def test_what_only_reads_undoes_nothing(registry: Registry, read: Work) -> None:
    """Its rollback leaves alone what others have committed meanwhile."""
    with isolate(registry):
        add(registry, "a")
        with session_scope(registry) as scope:
            read(registry)
            add(registry, "b")
            read(registry)
            add(registry, "c")
            scope.doom()
        assert notes(registry) == ["a", "b", "c"]


@each_read
def test_a_connection_knows_that_it_has_only_read(registry: Registry, read: Work) -> None:
    """So the commit after ``Session.remove()`` is not refused, nor is a ``released()`` block."""
    with isolate(registry):
        with session_scope(registry):
            read(registry)
            with current_scope().released():
                pass
            read(registry)
            registry.remove()
        with session_scope(registry) as scope:
            read(registry)
            add(registry, "audit")
            read(registry)
            connection: Any = registry.connection()
            assert not connection.has_written()
            scope.doom()
        assert notes(registry) == ["audit"]


@each_write
def test_further_writes_are_not_those_of_the_next_reader(registry: Registry, write: Work) -> None:
    """Rows are counted anew after each transaction that may have written."""
    with isolate(registry):
        _make_function(registry)
        with session_scope(registry):
            mine: Any = registry.connection()
            _look(registry)
            write(registry)
            assert mine.has_written()
            write(registry)
            with session_scope(registry):
                _look(registry)
                connection: Any = registry.connection()
                assert not connection.has_written()


@each_write
def test_a_connection_knows_what_it_has_written(registry: Registry, write: Work) -> None:
    """Of its own transaction, whatever others have written."""
    with isolate(registry):
        _make_function(registry)
        with session_scope(registry):
            connection: Any = registry.connection()
            add(registry, "audit")
            registry.scalars(select(Note)).all()
            assert not connection.has_written()
            savepoint = registry.begin_nested()
            write(registry)
            assert connection.has_written()
            savepoint.rollback()
            assert not connection.has_written()
            write(registry)
            assert connection.has_written()
            registry.rollback()
            assert not connection.has_written()
    assert not connection.has_written()


def test_a_server_that_counts_no_rows_is_asked_for_locks(postgres_database: Database) -> None:
    """Each savepoint that has written holds one."""
    engine = make_engine(postgres_database.url)

    @event.listens_for(engine, "connect")
    def _(driver: Any, record: object) -> None:
        driver.execute("SET track_counts = off")
        driver.commit()

    registry = make_registry(engine)
    with problem("has undone what"), isolate(registry):
        _make_function(registry)
        for work in (_look, _by_a_function):
            with session_scope(registry) as scope:
                work(registry)
                add(registry, "audit")
                scope.doom()
            assert notes(registry) == ["audit"]
    engine.dispose()


def test_a_server_that_counts_no_rows_is_not_asked_for_changed_rows(
    postgres_database: Database,
) -> None:
    """The driver has their number. Another transaction may have the savepoint's lock already."""
    engine = make_engine(postgres_database.url, connect_args={"options": "-c track_counts=off"})
    registry = make_registry(engine)
    with isolate(registry):
        one, two = registry.session_factory(), registry.session_factory()
        for session in (one, two):
            session.scalars(select(Note)).all()
        for session in (one, two):
            session.execute(insert(Note).values(text="a"))
            connection: Any = session.connection()
            assert connection.has_written()
        two.rollback()
        one.rollback()
        assert notes(registry) == []
    engine.dispose()


def test_a_failed_transaction_is_rolled_back(postgres_database: Database) -> None:
    """PostgreSQL cannot be asked then, so it counts as one that has written."""
    registry = make_registry(postgres_database.engine)
    with isolate(registry):
        for savepoint in (False, True):
            with session_scope(registry) as scope:
                registry.scalars(select(Note)).all()
                if savepoint:
                    registry.begin_nested()
                with pytest.raises(Exception, match="division by zero"):
                    registry.execute(text("SELECT 1 / 0"))
                driver: Any = registry.connection().connection.dbapi_connection
                assert driver.info.transaction_status == 3
                scope.doom()
        add(registry, "a")
        assert notes(registry) == ["a"]


def test_a_pragma_that_sets_something_writes(sqlite_database: Database) -> None:
    """It counts no rows."""
    registry = make_registry(sqlite_database.engine)
    with problem("has undone what"), isolate(registry), session_scope(registry) as scope:
        registry.execute(text("PRAGMA user_version = 5"))
        add(registry, "audit")
        scope.doom()
    with session_scope(registry):
        assert registry.scalar(text("PRAGMA user_version")) == 0


@pytest.mark.parametrize("pragma", ["user_version(5)", "main.application_id = 5"])
def test_a_pragma_writes_in_whatever_form(sqlite_database: Database, pragma: str) -> None:
    """With a schema's name, and in parentheses."""
    registry = make_registry(sqlite_database.engine)
    with isolate(registry), session_scope(registry):
        registry.execute(text(f"PRAGMA {pragma}"))
        connection: Any = registry.connection()
        assert connection.has_written()


def test_a_cursor_outside_of_a_transaction_does_not_count(registry: Registry) -> None:
    """There is no transaction yet that could have written."""
    with isolate(registry):
        with session_scope(registry):
            engine = registry.get_bind()
            assert isinstance(engine, Engine)
        with engine.connect() as connection:
            assert connection.connection.dbapi_connection is not None
            assert not connection.in_transaction()


def test_a_failed_transaction_fails_another_one_that_is_open(
    postgres_database: Database,
) -> None:
    """Until it is rolled back: they share a connection."""
    registry = make_registry(postgres_database.engine)
    with isolate(registry):
        one, two = registry.session_factory(), registry.session_factory()
        one.scalars(select(Note)).all()
        two.scalars(select(Note)).all()
        with pytest.raises(DBAPIError, match="division by zero"):
            one.execute(text("SELECT 1 / 0"))
        with pytest.raises(DBAPIError, match="aborted"):
            two.execute(select(1))
        one.rollback()
        two.rollback()
        for session in (one, two):
            session.add(Note(text="a"))
            session.commit()
            session.close()
        assert notes(registry) == ["a", "a"]


@pytest.fixture
def unknown_registry(tmp_path: Path) -> Iterator[Registry]:
    """A registry on a database that isolation knows nothing of."""
    engine = create_engine(
        f"sqlite:///{tmp_path / 'test.db'}", connect_args={"isolation_level": None}
    )
    Base.metadata.create_all(engine)
    engine.dialect.name = "unknown"
    yield make_registry(engine)
    engine.dispose()


def test_a_database_that_cannot_be_asked_is_believed(unknown_registry: Registry) -> None:
    """There a SELECT is a read, as its text says, and no constraint is deferred."""
    with isolate(unknown_registry):
        with session_scope(unknown_registry) as scope:
            unknown_registry.execute(select(Note)).all()
            add(unknown_registry, "a")
            scope.doom()
        with session_scope(unknown_registry):
            unknown_registry.add(Note(text="b"))
            unknown_registry.flush()
            add(unknown_registry, "c")
        assert notes(unknown_registry) == ["a", "b", "c"]


def test_a_database_that_cannot_be_asked_may_have_lost_it(unknown_registry: Registry) -> None:
    """So the report says what it depends on."""
    told = problem("has ended", "If it was committed", "remain in the database: delete them")
    with told, isolate(unknown_registry):
        add(unknown_registry, "stays")
        with contextlib.suppress(RuntimeError), session_scope(unknown_registry):
            unknown_registry.connection().connection.commit()
    assert notes(unknown_registry) == ["stays"]
