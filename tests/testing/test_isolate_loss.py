"""An outer transaction that was ended is noticed, and the report says what remains."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_engine, delete, select, text
from sqlalchemy.pool import StaticPool

from tests.support.models import Base, Note
from tests.support.postgres import DRIVERS
from tests.support.wsgi import make_registry
from tests.testing.applications import add, make_app, notes, problem, request
from wsgi_dbsession import session_scope
from wsgi_dbsession.testing import isolate

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import TypeAlias

    from tests.support import postgres
    from tests.support.models import Database
    from tests.testing.applications import Registry

    Way: TypeAlias = Callable[[Registry], object]

INSERT = "INSERT INTO note (text) VALUES ('stays')"


def driver_of(registry: Registry) -> Any:
    """Return the driver's connection, as the pool gives it out."""
    return registry.connection().connection


def _hidden_commit(registry: Registry) -> None:
    # PostgreSQL's comments nest.
    registry.execute(text(f"{INSERT}; /* a /* b */ c */ COMMIT"))


def _commit_on_a_cursor(registry: Registry) -> None:
    registry.execute(text(INSERT))
    driver_of(registry).cursor().execute("COMMIT")


def _commit_and_chain(registry: Registry) -> None:
    registry.execute(text(INSERT))
    driver_of(registry).cursor().execute("COMMIT AND CHAIN")


def _commit_of_the_driver(registry: Registry) -> None:
    registry.execute(text(INSERT))
    driver_of(registry).commit()


def _commit_of_the_driver_and_more(registry: Registry) -> None:
    registry.execute(text(INSERT))
    driver = driver_of(registry)
    driver.commit()
    driver.cursor().execute("INSERT INTO note (text) VALUES ('more')")


def _executescript(registry: Registry) -> None:
    driver_of(registry).executescript(f"{INSERT};")


def _commit_before_anything(registry: Registry) -> None:
    driver_of(registry).cursor().execute("COMMIT")
    driver_of(registry).cursor().execute(INSERT)
    driver_of(registry).commit()


WAYS: dict[str, tuple[Way, list[str]]] = {
    "COMMIT on a cursor": (_commit_on_a_cursor, ["sqlite", *DRIVERS]),
    "commit() of the driver": (_commit_of_the_driver, ["sqlite", *DRIVERS]),
    "commit() and more": (_commit_of_the_driver_and_more, ["sqlite", *DRIVERS]),
    "COMMIT at once": (_commit_before_anything, ["sqlite", *DRIVERS]),
    "COMMIT AND CHAIN": (_commit_and_chain, DRIVERS),
    "COMMIT in a statement": (_hidden_commit, DRIVERS),
    "executescript()": (_executescript, ["sqlite"]),
}
each_way = pytest.mark.parametrize(
    ("driver_database", "way"),
    [
        pytest.param(driver, way, id=f"{name}, {driver}")
        for name, (way, drivers) in WAYS.items()
        for driver in drivers
    ],
    indirect=["driver_database"],
)


@pytest.fixture
def registry(driver_database: Database) -> Registry:
    """A registry that uses each of the drivers."""
    return make_registry(driver_database.engine)


def _nothing(registry: Registry) -> None:
    pass


@each_way
@pytest.mark.parametrize("later", [_nothing, notes], ids=["nothing", "a look"])
def test_rows_that_remain_are_reported(
    driver_database: Database, registry: Registry, way: Way, later: Way
) -> None:
    """Whatever is done after the COMMIT, and even if each error is swallowed."""

    def work() -> None:
        registry.add(Note(text="stays, too"))
        registry.flush()
        way(registry)

    told = problem("was committed", "remain in the database: delete them", "noticed at")
    with told, isolate(registry):
        with contextlib.suppress(Exception):
            request(make_app(work, registry))
        with contextlib.suppress(Exception):
            later(registry)
    # What comes after the commit is committed as well, if sqlite3 does not begin by itself.
    assert {*driver_database.notes()} - {"more"} == {"stays", "stays, too"}

    with driver_database.observer.begin() as connection:
        connection.execute(delete(Note))
    with isolate(registry):
        add(registry, "a sound isolation")
        assert notes(registry) == ["a sound isolation"]
    assert driver_database.notes() == []


@each_way
def test_the_next_statement_notices(registry: Registry, way: Way) -> None:
    """Or the end of the transaction, if the driver is in a new one: then nothing else can."""
    with problem("was committed"), isolate(registry):
        with pytest.raises(RuntimeError, match="was committed"), session_scope(registry):
            way(registry)
            registry.execute(select(1))
        with pytest.raises(RuntimeError, match="was committed"):
            notes(registry)


@pytest.mark.parametrize("nested", [False, True], ids=["in it", "in an inner isolation"])
def test_each_isolation_reports_it(registry: Registry, nested: bool) -> None:
    """The inner one and the outer one have both lost what they stand on."""
    with problem("was committed"), isolate(registry):
        with (
            problem("was committed"),
            isolate(registry) if nested else contextlib.nullcontext(),
            session_scope(registry),
        ):
            _commit_on_a_cursor(registry)
        with problem("was committed"), isolate(registry):
            pytest.fail("it must not begin")


def test_an_error_of_the_test_comes_before_it(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    """The report is logged then."""
    with caplog.at_level(logging.ERROR), pytest.raises(ZeroDivisionError), isolate(registry):
        with contextlib.suppress(RuntimeError), session_scope(registry):
            _commit_of_the_driver_and_more(registry)
        raise ZeroDivisionError
    assert "remain in the database" in caplog.text


def test_a_rollback_past_sqlalchemy_is_noticed(
    driver_database: Database, registry: Registry
) -> None:
    """What was done before is gone, and what was committed after it is not."""
    told = problem("was rolled back", "committed after that remain")
    with told, isolate(registry):
        add(registry, "gone")
        with pytest.raises(RuntimeError, match="was rolled back"), session_scope(registry):
            driver_of(registry).rollback()
            driver_of(registry).cursor().execute(INSERT)
            driver_of(registry).commit()
            registry.execute(select(1))
    assert driver_database.notes() == ["stays"]


def test_a_connection_that_breaks_is_noticed_by_the_rollback(
    postgres_database: Database, postgres_admin: postgres.Admin
) -> None:
    """And the report of the isolation says so, although the error was swallowed."""
    registry = make_registry(postgres_database.engine)
    with problem("was lost"), isolate(registry):
        session = registry.session_factory()
        session.execute(text(INSERT))
        savepoint = session.begin_nested()
        session.execute(text(INSERT))
        postgres_admin.terminate()
        with pytest.raises(RuntimeError, match="was lost"):
            savepoint.rollback()
        session.close()


def test_a_connection_that_breaks_at_the_end_is_reported(
    postgres_database: Database, postgres_admin: postgres.Admin
) -> None:
    """Nothing but the end of the isolation can notice it."""
    registry = make_registry(postgres_database.engine)
    with problem("was lost"), isolate(registry):
        add(registry, "gone")
        postgres_admin.terminate()
    assert postgres_database.notes() == []


def test_what_is_left_open_after_it_ends_in_silence(registry: Registry) -> None:
    """A Session that outlives the isolation may roll back whatever it holds."""
    session = registry.session_factory()
    with problem("a transaction was never ended"), isolate(registry):
        session.close()
        session = registry.session_factory()
        savepoint = session.begin_nested()
        session.execute(text(INSERT))
    savepoint.rollback()
    session.rollback()
    session.close()


def test_a_forked_process_sends_nothing(postgres_database: Database) -> None:
    """The connection is its parent's, so what it closes must not roll back there."""
    registry = make_registry(postgres_database.engine)
    with isolate(registry):
        session = registry.session_factory()
        session.add(Note(text="a"))
        session.flush()
        driver: Any = session.connection().connection.dbapi_connection
        unused = registry.session_factory()
        unused.connection()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.close(driver.fileno())
                assert unused.connection().connection is not None
                session.close()
                unused.close()
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        unused.close()
        session.commit()
        session.close()
        assert notes(registry) == ["a"]


@pytest.mark.parametrize("ending", ["commit", "rollback", "close"])
def test_a_savepoint_that_is_gone_ends_the_isolation(
    driver_database: Database, registry: Registry, ending: str
) -> None:
    """A textual one, set before another transaction began, takes that one's along."""
    with problem("a savepoint of the isolation is gone"), isolate(registry):
        outer, inner = registry.session_factory(), registry.session_factory()
        outer.execute(text(INSERT))
        outer.execute(text("SAVEPOINT mine"))
        inner.execute(text(INSERT))
        outer.execute(text("ROLLBACK TO SAVEPOINT mine"))
        with pytest.raises(RuntimeError, match=r"begin_nested\(\) instead"):
            getattr(inner, ending)()
        with pytest.raises(RuntimeError, match="is gone"):
            outer.execute(select(1))
        outer.close()
        inner.close()
    assert driver_database.notes() == []


def test_an_own_savepoint_that_is_gone_is_as_in_production(
    driver_database: Database, registry: Registry
) -> None:
    """The release fails, and the rollback of the transaction mends it."""
    with isolate(registry):
        add(registry, "before")
        with session_scope(registry) as scope:
            registry.execute(text("SAVEPOINT mine"))
            registry.begin_nested()
            registry.execute(text(INSERT))
            registry.execute(text("ROLLBACK TO SAVEPOINT mine"))
            with pytest.raises(Exception, match="savepoint"):
                registry.commit()
            registry.rollback()
            scope.doom()
        add(registry, "after")
        assert notes(registry) == ["before", "after"]
    assert driver_database.notes() == []


@pytest.mark.parametrize(
    "statement",
    [
        "/* x */ COMMIT",
        "-- x\nROLLBACK",
        f"{INSERT}; COMMIT",
        "SELECT 'it''s'; /* ; */ END",
        "SELECT $x$;$x$; ROLLBACK AND CHAIN",
    ],
)
def test_what_ends_the_transaction_is_refused(
    driver_database: Database, registry: Registry, statement: str
) -> None:
    """Wherever it stands in the text; nothing of the text is executed."""
    with isolate(registry):
        with session_scope(registry):
            with pytest.raises(RuntimeError, match="must not end the outer transaction"):
                registry.execute(text(statement))
            registry.add(Note(text="a"))
        assert notes(registry) == ["a"]
    assert driver_database.notes() == []


@pytest.mark.parametrize(
    "statement",
    ["SELECT '; COMMIT'", 'SELECT 1 AS "; END"', "SELECT 1 /* ; ROLLBACK */ -- ; COMMIT"],
)
def test_what_only_looks_like_an_end_is_none(registry: Registry, statement: str) -> None:
    """In literals, quoted names and comments."""
    with isolate(registry), session_scope(registry):
        registry.execute(text(statement))


def test_a_trigger_has_an_end_of_its_own(sqlite_database: Database) -> None:
    """The body of a trigger or of a function is no list of statements."""
    registry = make_registry(sqlite_database.engine)
    with isolate(registry):
        with session_scope(registry):
            registry.execute(
                text(
                    "CREATE TRIGGER copies AFTER INSERT ON note WHEN new.text = 'a' BEGIN "
                    "INSERT INTO note (text) VALUES ('copy'); END"
                )
            )
        add(registry, "a")
        assert notes(registry) == ["a", "copy"]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="sqlite3 has it since Python 3.12")
def test_a_driver_that_is_always_in_a_transaction_is_found_out(tmp_path: Path) -> None:
    """With autocommit=False, sqlite3 begins a transaction right after the commit."""
    engine = create_engine(f"sqlite:///{tmp_path / 'test.db'}", connect_args={"autocommit": False})
    Base.metadata.create_all(engine)
    registry = make_registry(engine)
    with problem("was committed"), isolate(registry), session_scope(registry):
        _commit_of_the_driver(registry)
    engine.dispose()


def test_an_in_memory_database_survives(tmp_path: Path) -> None:
    """Its only connection must not be thrown away."""
    engine = create_engine("sqlite://", poolclass=StaticPool)
    Base.metadata.create_all(engine)
    registry = make_registry(engine)
    for _ in range(2):
        with problem("was committed"), isolate(registry), session_scope(registry):
            _commit_of_the_driver(registry)
    assert notes(registry) == ["stays", "stays"]
    with isolate(registry):
        add(registry, "gone")
    assert notes(registry) == ["stays", "stays"]
    engine.dispose()
