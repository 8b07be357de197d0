"""Engines are bound, and bound back."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, event, func, insert, select, text
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import Session as SQLAlchemySession

from tests.support.models import Base, Database, Note
from tests.support.wsgi import make_registry
from tests.testing.applications import Registry, add, make_app, notes, request
from wsgi_dbsession import session_scope
from wsgi_dbsession.testing import isolate, record_outcomes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_core_on_the_sessions_engine_is_isolated(database: Database, registry: Registry) -> None:
    """``get_bind()`` returns an engine, with its own connections, options and inspection."""
    with isolate(registry):
        with session_scope(registry):
            engine = registry.get_bind()
            assert isinstance(engine, Engine)
        with engine.begin() as connection:
            connection.execute(insert(Note).values(text="a"))
        with engine.execution_options(
            isolation_level="SERIALIZABLE", schema_translate_map={"x": None}
        ).connect() as connection:
            assert connection.scalar(select(func.count(Note.id))) == 1
            connection.execute(insert(Note).values(text="not committed"))
        assert notes(registry) == ["a"]
        Base.metadata.create_all(engine)
    assert database.notes() == []


def test_the_isolation_level_is_that_of_the_outer_transaction(registry: Registry) -> None:
    """What can only be said at the begin of a transaction is not said again."""
    with isolate(registry):
        add(registry, "a")
        with session_scope(registry):
            registry.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
            registry.add(Note(text="b"))
        assert notes(registry) == ["a", "b"]


@pytest.mark.parametrize("by", ["create_engine", "execution_options"])
def test_an_engine_in_autocommit_mode_is_isolated(postgres_database: Database, by: str) -> None:
    """Its connection is in a transaction all the same, and in autocommit mode afterwards."""
    engine = create_engine(
        postgres_database.url,
        **({"isolation_level": "AUTOCOMMIT"} if by == "create_engine" else {}),
    )
    if by == "execution_options":
        engine = engine.execution_options(isolation_level="AUTOCOMMIT")
    registry = make_registry(engine)
    with isolate(registry):
        add(registry, "gone")
    assert postgres_database.notes() == []
    with engine.connect() as connection:
        connection.execute(insert(Note).values(text="stays"))
    assert postgres_database.notes() == ["stays"]
    engine.dispose()


def test_the_binding_is_the_old_one_afterwards(database: Database, registry: Registry) -> None:
    """Options of the factory are those from before, also where the block failed to begin."""
    unbound = make_registry(None)
    options = dict(registry.session_factory.kw)
    with isolate(registry):
        assert registry.session_factory.kw["bind"] is not database.engine
    with pytest.raises(ValueError, match="must be bound to an engine"), isolate(registry, unbound):
        pytest.fail("it must not begin")
    assert registry.session_factory.kw == options


def test_an_engine_bound_meanwhile_stays(database: Database, registry: Registry) -> None:
    """An application that is made in the isolation and configures its registry keeps that."""
    with isolate(registry):
        registry.session_factory.configure(bind=database.observer)
        with pytest.raises(RuntimeError, match="outside of the isolation"):
            add(registry, "outside")
    assert registry.session_factory.kw["bind"] is database.observer
    assert database.notes() == []


def flush_past_the_isolation(registry: Registry) -> None:
    """Use a Session that is older than the isolation, which is refused."""
    with pytest.raises(RuntimeError, match="outside of the isolation"), session_scope(registry):
        registry()
        with isolate(registry):
            registry.add(Note(text="outside"))
            registry.flush()


def test_a_session_from_before_is_refused(database: Database, registry: Registry) -> None:
    """It would work on a connection of its own, and commit."""
    flush_past_the_isolation(registry)
    assert database.notes() == []


def test_a_session_that_chooses_its_engine_is_refused_from_before(database: Database) -> None:
    """The isolation puts another class in place of its own."""

    class Choosing(SQLAlchemySession):
        def get_bind(self, *arguments: Any, **options: Any) -> Engine:
            return database.engine

    flush_past_the_isolation(make_registry(None, class_=Choosing))
    assert database.notes() == []


@pytest.mark.promise("nothing remains")
@pytest.mark.parametrize("kept", ["the whole test", "the isolation"])
def test_a_transaction_from_before_refuses_the_isolation(
    database: Database, registry: Registry, kept: str
) -> None:
    """A fixture opens a scope and reads, then one isolates: what the test writes would stay."""
    refused = pytest.raises(RuntimeError, match="outside of the isolation")
    with refused, contextlib.ExitStack() as test:
        test.enter_context(session_scope(registry))
        registry.scalars(select(Note)).all()
        with isolate(registry):
            registry.add(Note(text="stays"))
            if kept == "the isolation":
                registry.commit()
    assert database.notes() == []
    with isolate(registry):
        add(registry, "gone")
    assert database.notes() == []


def test_a_scope_from_before_without_a_transaction_is_not_refused(
    database: Database, registry: Registry
) -> None:
    """A fixture may add reference data, commit, and keep its scope."""
    with session_scope(registry):
        registry.add(Note(text="there"))
        registry.commit()
        with isolate(registry):
            add(registry, "gone")
            assert notes(registry) == ["there", "gone"]
        assert registry.scalars(select(Note.text)).all() == ["there"]
    assert database.notes() == ["there"]


def test_a_transaction_of_another_registry_is_not_refused(
    database: Database, registry: Registry
) -> None:
    """What is not isolated may be at work around the isolation."""
    other = make_registry(database.engine)
    with session_scope(other, registry):
        other.scalars(select(Note)).all()
        with isolate(registry):
            add(registry, "gone")
        other.scalars(select(Note)).all()
    assert database.notes() == []


def _flush(session: SQLAlchemySession) -> None:
    session.add(Note(text="outside"))
    session.flush()


def _commit(session: SQLAlchemySession) -> None:
    session.execute(insert(Note).values(text="outside"))
    session.commit()


@pytest.mark.promise("nothing remains")
@pytest.mark.parametrize("write", [_flush, _commit])
def test_a_transaction_from_before_is_refused_without_a_scope(
    database: Database, registry: Registry, write: Callable[[SQLAlchemySession], None]
) -> None:
    """That of another thread, for example: no scope leads to it."""
    with registry.session_factory() as session:
        session.scalars(select(Note)).all()
        with isolate(registry), pytest.raises(RuntimeError, match="outside of the isolation"):
            write(session)
    assert database.notes() == []


def test_a_transaction_from_before_that_has_only_read_may_end(
    database: Database, registry: Registry
) -> None:
    """Its commit leaves nothing behind."""
    session = registry.session_factory()
    session.scalars(select(Note)).all()
    with isolate(registry):
        session.commit()
        session.close()
        add(registry, "gone")
    assert database.notes() == []


@pytest.mark.parametrize("inner_first", [True, False], ids=["in order", "in the wrong order"])
def test_an_isolation_refuses_after_another_one_has_ended(
    database: Database, registry: Registry, inner_first: bool
) -> None:
    """Each removes its own listeners only."""
    session = registry.session_factory()
    session.scalars(select(Note)).all()
    isolations = [isolate(registry), isolate(registry)]
    for each in isolations:
        each.__enter__()
    if inner_first:
        isolations.reverse()
    isolations[0].__exit__(None, None, None)
    with pytest.raises(RuntimeError, match="outside of the isolation"):
        _flush(session)
    session.close()
    isolations[1].__exit__(None, None, None)
    assert database.notes() == []


def test_a_registry_bound_to_a_connection_is_refused(database: Database) -> None:
    """Somebody has begun to write their own isolation."""
    with database.engine.connect() as connection:
        registry = make_registry(connection)
        with pytest.raises(TypeError, match="must be bound to an engine"), isolate(registry):
            pytest.fail("it must not begin")


def test_what_is_no_registry_is_refused(database: Database) -> None:
    """The errors are those of ``session_scope``."""
    for block in (isolate, record_outcomes):
        with pytest.raises(TypeError, match="scoped_session"), block(database):  # type: ignore[arg-type]
            pytest.fail("it must not begin")
        with pytest.raises(ValueError, match="registries must not be empty"), block():
            pytest.fail("it must not begin")


def test_a_begin_that_fails_gives_its_connection_back(tmp_path: Path) -> None:
    """No connection stays checked out."""
    path = tmp_path / "test.db"
    path.write_bytes(b"no database at all, but long enough to be looked at as if it were one" * 9)
    engine = create_engine(f"sqlite:///{path}", pool_size=1, max_overflow=0, pool_timeout=1)
    event.listen(engine, "connect", lambda driver, _: driver.execute("PRAGMA foreign_keys=ON"))
    registry = make_registry(engine)
    for _ in range(2):
        with pytest.raises(DatabaseError, match="not a database"), isolate(registry):
            pytest.fail("it must not begin")
    engine.dispose()


def test_isolations_may_end_in_the_wrong_order(database: Database, registry: Registry) -> None:
    """With the outer one, the inner one is over, too."""
    outer, inner = isolate(registry), isolate(registry)
    outer.__enter__()
    inner.__enter__()
    add(registry, "a")
    outer.__exit__(None, None, None)
    inner.__exit__(None, None, None)
    assert registry.session_factory.kw["bind"] is database.engine
    assert notes(registry) == []


def test_a_connection_that_cannot_be_made_leaves_nothing_behind(tmp_path: Path) -> None:
    """The error is the driver's, and the registry is as it was."""
    engine = create_engine(f"sqlite:///{tmp_path / 'missing' / 'test.db'}")
    registry = make_registry(engine)
    with pytest.raises(Exception, match="unable to open"), isolate(registry):
        pytest.fail("it must not begin")
    assert registry.session_factory.kw["bind"] is engine


@pytest.mark.parametrize(
    "statement",
    ["COMMIT", " rollback", "END", "ABORT", "ROLLBACK TRANSACTION", "PREPARE TRANSACTION 'x'"],
)
def test_textual_ends_of_the_outer_transaction_are_refused(
    registry: Registry, statement: str
) -> None:
    """They would end it behind everybody's back."""
    with isolate(registry):
        with session_scope(registry):
            with pytest.raises(RuntimeError, match="outer transaction"):
                registry.execute(text(statement))
            registry.add(Note(text="a"))
        assert notes(registry) == ["a"]


def test_textual_savepoints_are_no_ends(registry: Registry) -> None:
    """Those are within the transaction."""
    with isolate(registry), session_scope(registry):
        for statement in ("SAVEPOINT x", "ROLLBACK TO SAVEPOINT x", "RELEASE SAVEPOINT x"):
            registry.execute(text(statement))


def test_a_raw_connection_is_refused(registry: Registry) -> None:
    """The pool would give another one, outside of the isolation."""
    with isolate(registry), session_scope(registry):
        engine = registry.get_bind()
        assert isinstance(engine, Engine)
        with pytest.raises(RuntimeError, match="outside of the isolation"):
            engine.raw_connection()


def test_listeners_see_what_they_see_in_production(database: Database) -> None:
    """A counter of statements counts the application's, and none of the isolation's."""
    registry = make_registry(database.engine)
    seen: list[str] = []

    @event.listens_for(database.engine, "before_cursor_execute")
    def _(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if not statement.startswith("BEGIN"):  # SQLAlchemy's recipe for SQLite
            seen.append(statement)

    for name in ("commit", "rollback", "savepoint", "rollback_savepoint", "release_savepoint"):

        def listen(*arguments: Any, name: str = name) -> None:
            seen.append(name)

        event.listen(database.engine, name, listen)

    def work() -> None:
        with registry.begin_nested():
            registry.execute(insert(Note).values(id=1))
        savepoint = registry.begin_nested()
        registry.execute(insert(Note).values(id=2))
        savepoint.rollback()
        registry.commit()
        registry.scalars(select(Note)).all()

    def run() -> list[str]:
        seen.clear()
        request(make_app(work, registry, status="400 Bad Request"))
        # In production the statements of savepoints are seen, besides the events.
        return [each for each in seen if "SAVEPOINT" not in each]

    with isolate(registry):
        isolated = run()
    assert isolated == run()
    assert len(isolated) > 7


def test_a_listener_may_use_the_connection(database: Database, registry: Registry) -> None:
    """It does so in the midst of the statement that it is told of, as in production."""

    @event.listens_for(database.engine, "before_cursor_execute")
    def look(connection: Connection, cursor: Any, statement: str, *rest: Any) -> None:
        if statement.startswith("INSERT"):
            savepoint = connection.begin_nested()
            connection.exec_driver_sql("DELETE FROM note")
            savepoint.rollback()

    with isolate(registry):
        for word in ("a", "b"):
            add(registry, word)
        assert notes(registry) == ["a", "b"]


def test_begin_listeners_work_in_each_transaction(postgres_database: Database) -> None:
    """``SET LOCAL`` at the begin of each transaction is a usual one."""
    engine = postgres_database.engine
    registry, two_phase = make_registry(engine), make_registry(engine, twophase=True)

    begun: list[object] = []

    @event.listens_for(engine, "begin")
    def set_name(connection: Connection) -> None:
        connection.execute(text("SET LOCAL application_name = 'listener'"))

    event.listen(engine, "begin_twophase", lambda connection, xid: begun.append(xid))
    with isolate(registry, two_phase):
        for _ in range(2):
            with session_scope(registry) as scope:
                assert registry.scalar(text("SHOW application_name")) == "listener"
                scope.doom()
        add(two_phase, "a")
        assert len(begun) == 1


def test_a_begin_that_fails_leaves_no_transaction(postgres_database: Database) -> None:
    """Neither does the failure of a listener."""
    registry = make_registry(postgres_database.engine)
    fail = [True]

    @event.listens_for(postgres_database.engine, "begin")
    def _(connection: Connection) -> None:
        if fail:
            raise ZeroDivisionError

    with isolate(registry):
        with pytest.raises(ZeroDivisionError):
            add(registry, "a")
        fail.clear()
        add(registry, "b")
        assert notes(registry) == ["b"]
