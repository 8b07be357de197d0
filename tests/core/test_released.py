"""In ``released()`` the Sessions hold no connection, and nothing that was written is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_engine, event, inspect, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError

from tests.core.discards import HARMLESS, WRITES, insert_by_text
from tests.support.errors import AppError, Kill
from tests.support.models import Author, Database, Note, make_engine
from tests.support.wsgi import assert_nothing_left, make_registry
from wsgi_dbsession import _driver, session_scope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy.orm import Session, scoped_session

    Registry = scoped_session[Session]
    Work = Callable[[Registry], object]

pytestmark = pytest.mark.promise("released")

REFUSED = "session_scope: cannot release connections at .*test_released.py:"
NO_STATEMENT = "session_scope: no statement may run in the released.. block at .*test_released.py:"


def checked_out(database: Database) -> int:
    pool: Any = database.engine.pool
    count: int = pool.checkedout()
    return count


def stock(database: Database) -> None:
    with database.observer.begin() as connection:
        connection.execute(Note.__table__.insert().values(text="there"))  # type: ignore[attr-defined]


@pytest.fixture
def stocked(database: Database, registry: Registry) -> Registry:
    """A registry over a database with one note."""
    stock(database)
    return registry


@pytest.fixture(params=["BEGIN recipe", "legacy transactions", "postgres"])
def every_driver(request: pytest.FixtureRequest) -> Iterator[tuple[Registry, Database]]:
    """The same, on SQLite as in SQLAlchemy's recipe or without."""
    name = "postgres" if request.param == "postgres" else "sqlite"
    database: Database = request.getfixturevalue(f"{name}_database")
    stock(database)
    legacy = request.param == "legacy transactions"
    engine = create_engine(database.url) if legacy else database.engine
    registry = make_registry(engine)
    yield registry, database
    assert_nothing_left(registry)
    if legacy:
        engine.dispose()


# -- the block ------------------------------------------------------------------------------------


def test_the_connection_is_in_the_pool_and_the_objects_stay(
    stocked: Registry, database: Database
) -> None:
    """They are attached, and not expired; what changes afterwards is committed."""
    with session_scope(stocked) as scope:
        note = stocked.scalars(select(Note)).one()
        assert checked_out(database) == 1
        with scope.released():
            assert checked_out(database) == 0
            assert not inspect(note).expired_attributes
            assert note in stocked()
            assert stocked.get(Note, note.id) is note
            assert note.text == "there"
        note.text = "changed"

    assert scope.outcome == "commit"
    assert database.notes() == ["changed"]


def test_an_attribute_that_is_set_in_the_block_is_committed(
    stocked: Registry, database: Database
) -> None:
    """Nothing is sent before the block ends."""
    with session_scope(stocked) as scope:
        note = stocked.scalars(select(Note)).one()
        with scope.released():
            note.text = "changed"
            stocked.add(Note(text="new"))
            assert checked_out(database) == 0

    assert database.notes() == ["changed", "new"]


def test_an_error_ends_the_block(stocked: Registry, database: Database) -> None:
    """What follows works, if the application has caught it."""
    with session_scope(stocked) as scope:
        note = stocked.scalars(select(Note)).one()
        with pytest.raises(AppError), scope.released():
            raise AppError
        assert stocked.scalar(text("SELECT text FROM note")) == "there"
        with pytest.raises(Kill), scope.released():
            raise Kill
        note.text = "changed"

    assert database.notes() == ["changed"]


def test_a_block_in_a_block_changes_nothing(stocked: Registry, database: Database) -> None:
    """The outer one ends it, even if something is pending; both may be the same block."""
    with session_scope(stocked) as scope:
        note = stocked.scalars(select(Note)).one()
        with scope.released():
            note.text = "changed"
            with scope.released():
                assert checked_out(database) == 0
            with pytest.raises(RuntimeError, match=NO_STATEMENT):
                stocked.scalar(text("SELECT 1"))
        assert stocked.scalar(select(Note.text)) == "changed"


def test_the_first_block_may_end_first(sqlite_registry: Registry) -> None:
    """Two generators: each refuses statements until it ends."""
    with session_scope(sqlite_registry) as scope:
        sqlite_registry.scalar(text("SELECT 1"))
        first, second = scope.released(), scope.released()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        with pytest.raises(RuntimeError, match=NO_STATEMENT):
            sqlite_registry.scalar(text("SELECT 1"))
        second.__exit__(None, None, None)
        assert sqlite_registry.scalar(text("SELECT 1")) == 1


def test_one_scope_has_many_blocks(stocked: Registry, database: Database) -> None:
    """Each gives back what was used since the one before."""
    with session_scope(stocked) as scope:
        for number in range(3):
            stocked.scalars(select(Note)).one()
            with scope.released():
                assert checked_out(database) == 0, number


def test_a_session_that_was_not_used_needs_nothing(sqlite_registry: Registry) -> None:
    """Neither does a scope without Sessions."""
    with session_scope(sqlite_registry) as scope:
        with scope.released():
            pass
        sqlite_registry()
        with scope.released():
            pass


def test_no_listener_is_told_of_a_commit_or_a_rollback(stocked: Registry) -> None:
    """Who counts transactions of the ORM, or sends mail after them, does not see this end."""
    called: list[str] = []
    for name in ("before_commit", "after_commit", "after_rollback", "after_soft_rollback"):
        event.listen(
            stocked.session_factory, name, lambda *_, name=name: called.append(name), named=False
        )
    with session_scope(stocked) as scope:
        stocked.scalars(select(Note)).one()
        with scope.released():
            pass
        assert called == []


def test_methods_that_were_replaced_in_the_session_come_back(sqlite_registry: Registry) -> None:
    """An application, or a test, may have put its own there; or nothing."""
    with session_scope(sqlite_registry) as scope:
        session = sqlite_registry()
        mine = session.get_bind
        vars(session)["get_bind"] = mine
        with scope.released(), pytest.raises(RuntimeError, match=NO_STATEMENT):
            session.scalar(text("SELECT 1"))
        assert session.scalar(text("SELECT 1")) == 1
        assert vars(session)["get_bind"] is mine
        assert not {"connection", "flush"} & set(vars(session))


def test_a_session_without_autobegin_begins_again(
    sqlite_database: Database,
) -> None:
    """The application need not know that its transaction has ended."""
    registry = make_registry(sqlite_database.engine, autobegin=False)
    with session_scope(registry) as scope:
        registry.begin()
        registry.scalar(text("SELECT 1"))
        with scope.released():
            assert_nothing_is_held(registry)
            registry.add(Note(text="a"))
        assert registry.scalar(select(Note.text)) == "a"
        registry.rollback()
        with scope.released():
            assert not registry().in_transaction()
        assert not registry().in_transaction()


# -- what is refused, with nothing lost -----------------------------------------------------------


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_is_refused_and_not_lost(
    every_driver: tuple[Registry, Database], write: Work
) -> None:
    """The error comes before the block, and the transaction goes on."""
    registry, database = every_driver
    entered = False

    with session_scope(registry) as scope:
        write(registry)
        with (
            pytest.raises(RuntimeError, match=REFUSED + ".*something was written or is pending"),
            scope.released(),
        ):
            entered = True

    assert not entered
    assert database.notes() != ["there"]


@pytest.mark.parametrize("work", HARMLESS.values(), ids=HARMLESS)
def test_a_correct_program_is_not_refused(
    every_driver: tuple[Registry, Database], work: Work, caplog: pytest.LogCaptureFixture
) -> None:
    """What only read, or was committed or rolled back, may be released."""
    registry, _ = every_driver

    with session_scope(registry) as scope:
        work(registry)
        with scope.released():
            assert_nothing_is_held(registry)

    assert caplog.records == []


def assert_nothing_is_held(registry: Registry) -> None:
    pool: Any = registry.session_factory.kw["bind"].pool
    assert pool.checkedout() == 0


@pytest.mark.parametrize("begin", ["begin", "begin_nested"])
def test_a_block_of_a_transaction_is_refused(stocked: Registry, begin: str) -> None:
    """Its end would find another transaction, or none."""
    with session_scope(stocked) as scope:
        with getattr(stocked, begin)():
            stocked.scalars(select(Note)).one()
            with pytest.raises(RuntimeError, match=REFUSED + ".*in begin_nested"):
                scope.released().__enter__()
            assert stocked.scalar(text("SELECT text FROM note")) == "there"
        with scope.released():
            pass


def test_a_savepoint_without_a_block_is_refused_too(stocked: Registry) -> None:
    """Somebody waits to roll it back."""
    with session_scope(stocked) as scope:
        savepoint = stocked.begin_nested()
        with pytest.raises(RuntimeError, match=REFUSED):
            scope.released().__enter__()
        savepoint.rollback()
        with scope.released():
            pass


def test_a_row_that_is_locked_is_refused(
    postgres_registry: Registry, postgres_database: Database
) -> None:
    """The lock would be gone: PostgreSQL calls it a write."""
    stock(postgres_database)
    with session_scope(postgres_registry) as scope:
        postgres_registry.scalars(select(Note).with_for_update()).one()
        with pytest.raises(RuntimeError, match=REFUSED):
            scope.released().__enter__()


def test_a_notification_is_no_write(postgres_registry: Registry) -> None:
    """PostgreSQL gives it no transaction ID before the COMMIT: what the docs warn of."""
    with session_scope(postgres_registry) as scope:
        postgres_registry.execute(text("NOTIFY news"))
        with scope.released():
            assert_nothing_is_held(postgres_registry)


def test_a_failed_transaction_is_refused(postgres_registry: Registry) -> None:
    """It cannot be asked; so the swallowed error still fails the commit."""
    with pytest.raises(PendingRollbackError), session_scope(postgres_registry) as scope:
        insert_by_text(postgres_registry)
        with pytest.raises(DBAPIError):
            postgres_registry.execute(text("SELECT 1/0"))
        with pytest.raises(RuntimeError, match=REFUSED + ".*cannot be known here"):
            scope.released().__enter__()


def test_an_old_server_is_not_asked(
    postgres_registry: Registry, postgres_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not know the function, and would abort the transaction: that one goes on."""
    dialect = postgres_database.engine.dialect
    with session_scope(postgres_registry) as scope:
        insert_by_text(postgres_registry)
        monkeypatch.setattr(dialect, "server_version_info", (12, 22))
        monkeypatch.setattr(_driver, "_POSTGRESQL", "SELECT no_such_function()")
        with pytest.raises(RuntimeError, match=REFUSED + ".*cannot be known here"):
            scope.released().__enter__()

    assert postgres_database.notes() == ["lost"]


def test_a_failed_flush_is_refused(registry: Registry) -> None:
    """SQLAlchemy has rolled back by then, and with it what Core had written."""
    with pytest.raises(PendingRollbackError), session_scope(registry) as scope:
        insert_by_text(registry)
        registry.add(Note(id=1, text="twice"))
        with pytest.raises(IntegrityError):
            registry.flush()
        with pytest.raises(RuntimeError, match=REFUSED + ".*cannot be known here"):
            scope.released().__enter__()


def test_a_lost_connection_is_refused(postgres_registry: Registry) -> None:
    """What it had written is lost, and the application is to notice."""
    with pytest.raises(PendingRollbackError), session_scope(postgres_registry) as scope:
        insert_by_text(postgres_registry)
        postgres_registry.connection().invalidate()
        with pytest.raises(RuntimeError, match=REFUSED + ".*cannot be known here"):
            scope.released().__enter__()
        postgres_registry.scalar(text("SELECT 1"))


# -- several Sessions, other engines --------------------------------------------------------------


def test_all_sessions_of_the_scope_are_released(
    postgres_registry: Registry,
    postgres_database: Database,
    other_postgres_database: Database,
) -> None:
    """The scope has them, whichever block adopted their registry."""
    other = make_registry(other_postgres_database.engine)
    with session_scope(other):
        pass
    with session_scope(postgres_registry) as scope:
        postgres_registry.scalar(text("SELECT 1"))
        other.scalar(text("SELECT 1"))
        with scope.released():
            assert checked_out(postgres_database) == checked_out(other_postgres_database) == 0
    assert_nothing_left(other)


def test_one_session_that_wrote_keeps_all(
    postgres_registry: Registry,
    postgres_database: Database,
    other_postgres_database: Database,
) -> None:
    """All or none: the others are as they were."""
    other = make_registry(other_postgres_database.engine)
    with session_scope(postgres_registry, other) as scope:
        postgres_registry.scalar(text("SELECT 1"))
        insert_by_text(other)
        with pytest.raises(RuntimeError, match=REFUSED), scope.released():
            pass
        assert checked_out(postgres_database) == checked_out(other_postgres_database) == 1
        assert postgres_registry.scalar(text("SELECT 1")) == 1

    assert other_postgres_database.notes() == ["lost"]


def test_two_phase_sessions_are_released(
    postgres_database: Database, other_postgres_database: Database
) -> None:
    """Nothing is prepared; and afterwards they are prepared as ever."""
    registries = [
        make_registry(each.engine, twophase=True)
        for each in (postgres_database, other_postgres_database)
    ]
    stock(postgres_database)
    with session_scope(*registries) as scope:
        note = registries[0].scalars(select(Note)).one()
        registries[1].scalar(text("SELECT 1"))
        with scope.released():
            assert checked_out(postgres_database) == checked_out(other_postgres_database) == 0
        note.text = "changed"
        insert_by_text(registries[1])
        with pytest.raises(RuntimeError, match=REFUSED), scope.released():
            pass

    assert postgres_database.notes() == ["changed"]
    assert other_postgres_database.notes() == ["lost"]


def test_autocommit_has_nothing_to_lose(postgres_database: Database) -> None:
    """What was written by Core is committed already."""
    engine = make_engine(postgres_database.url, isolation_level="AUTOCOMMIT")
    registry = make_registry(engine)
    with session_scope(registry) as scope:
        insert_by_text(registry)
        with scope.released():
            assert_nothing_is_held(registry)

    assert postgres_database.notes() == ["lost"]
    engine.dispose()


def test_a_connection_of_the_application_stays_its_own(sqlite_database: Database) -> None:
    """Only the transaction on it ends."""
    with sqlite_database.engine.connect() as connection:
        registry = make_registry(connection)
        with session_scope(registry) as scope:
            registry.scalar(text("SELECT 1"))
            with scope.released():
                assert not connection.in_transaction()
                assert not connection.closed
            registry.add(Note(text="a"))

    assert sqlite_database.notes() == ["a"]


def test_repeatable_read_sees_another_snapshot(postgres_database: Database) -> None:
    """Two transactions are two snapshots: what the docs warn of."""
    engine = make_engine(postgres_database.url, isolation_level="REPEATABLE READ")
    registry = make_registry(engine)
    stock(postgres_database)
    count = text("SELECT count(*) FROM note")
    with session_scope(registry) as scope:
        assert registry.scalar(count) == 1
        stock(postgres_database)
        assert registry.scalar(count) == 1
        with scope.released():
            pass
        assert registry.scalar(count) == 2
    engine.dispose()


# -- failures -------------------------------------------------------------------------------------


def test_a_connection_that_is_lost_by_then_is_thrown_away(
    postgres_registry: Registry,
    postgres_database: Database,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The rollback fails, which costs nothing: another connection takes over."""
    stock(postgres_database)
    dialect: Any = postgres_database.engine.dialect
    ended: list[object] = []
    event.listen(
        postgres_registry.session_factory, "after_transaction_end", lambda *_: ended.append(1)
    )

    def fail(connection: object) -> None:
        raise dialect.loaded_dbapi.OperationalError

    with session_scope(postgres_registry) as scope:
        note = postgres_registry.scalars(select(Note)).one()
        pid = postgres_registry.scalar(text("SELECT pg_backend_pid()"))
        with monkeypatch.context() as patch:
            patch.setattr(dialect, "do_rollback", fail)
            with scope.released():
                assert checked_out(postgres_database) == 0
                assert ended == [1]
        assert postgres_registry.scalar(text("SELECT pg_backend_pid()")) != pid
        note.text = "changed"

    assert postgres_database.notes() == ["changed"]
    assert "rollback failed, closing the connection instead" in caplog.text


@pytest.mark.parametrize("failing", [1, 2], ids=["the first", "the second"])
def test_one_of_two_rollbacks_fails(
    postgres_database: Database,
    other_postgres_database: Database,
    monkeypatch: pytest.MonkeyPatch,
    failing: int,
) -> None:
    """The Session gives both connections back."""
    engines = postgres_database.engine, other_postgres_database.engine
    registry = make_registry(engines[0], binds={Note: engines[0], Author: engines[1]})
    seen: list[object] = []

    def fail_once(connection: Any) -> None:
        if connection.dbapi_connection not in seen:
            seen.append(connection.dbapi_connection)
            if len(seen) == failing:
                raise engines[0].dialect.loaded_dbapi.OperationalError
        connection.rollback()

    with session_scope(registry) as scope:
        registry.scalars(select(Note)).all()
        registry.scalars(select(Author)).all()
        for engine in engines:
            monkeypatch.setattr(engine.dialect, "do_rollback", fail_once)
        with scope.released():
            assert checked_out(postgres_database) == checked_out(other_postgres_database) == 0
        registry.add_all([Note(text="a"), Author(name="b")])

    assert postgres_database.notes() == ["a"]
    assert other_postgres_database.committed(Author.name) == ["b"]


def test_an_interruption_of_the_rollback_leaves_nothing_refused(
    postgres_registry: Registry, postgres_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is thrown away, even if it seems to work again, and no block begins."""
    stock(postgres_database)
    dialect = postgres_database.engine.dialect

    def interrupt(connection: object) -> None:
        monkeypatch.undo()
        raise Kill

    with session_scope(postgres_registry) as scope:
        note = postgres_registry.scalars(select(Note)).one()
        pid = postgres_registry.scalar(text("SELECT pg_backend_pid()"))
        monkeypatch.setattr(dialect, "do_rollback", interrupt)
        with pytest.raises(Kill), scope.released():
            pass
        assert postgres_registry.scalar(text("SELECT pg_backend_pid()")) != pid
        postgres_registry.rollback()
        assert checked_out(postgres_database) == 0
        assert not scope.releases
        assert note.text == "there"
        note.text = "changed"

    assert postgres_database.notes() == ["changed"]
