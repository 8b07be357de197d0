"""The read-only engine: no server executes a write on it, and the errors name the way out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from sqlalchemy import Engine, create_engine, event, func, insert, make_url, select, text
from sqlalchemy.exc import DBAPIError, InvalidRequestError, OperationalError
from sqlalchemy.orm import Session

from tests.replica.conftest import DRIVERS
from tests.replica.tables import Note, empty_tables
from tests.support.clusters import pgbouncer
from wsgi_dbsession.replica import is_refused_write, read_only_engine

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sqlalchemy import URL

    from tests.support.clusters import PostgresCluster

    Keep = Callable[[Engine], Engine]

# Of the tests that start servers, one worker runs all.
pytestmark = pytest.mark.xdist_group("replica")


@pytest.fixture(params=[*DRIVERS, pytest.param("pymysql", marks=pytest.mark.clusters), "sqlite"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> URL:
    """A database with the tables, by each driver in turn."""
    if request.param == "sqlite":
        found = make_url(f"sqlite:///{tmp_path / 'test.db'}")
        empty_tables(found)
        return found
    if request.param == "pymysql":
        found = request.getfixturevalue("mariadb_url")
    else:
        cluster: PostgresCluster = request.getfixturevalue("cluster")
        found = cluster.primary.url(driver=request.param)
    empty_tables(found)
    return found


@pytest.fixture
def engine(url: URL, keep: Keep) -> Engine:
    """An engine that writes."""
    return keep(create_engine(url))


@pytest.fixture
def reads(url: URL, keep: Keep) -> Engine:
    """One that does not."""
    return keep(read_only_engine(url))


def notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", []))


def count(engine: Engine) -> int:
    with engine.connect() as connection:
        return connection.execute(select(func.count()).select_from(Note)).scalar_one()


def test_it_reads_what_is_committed_meanwhile(engine: Engine, reads: Engine) -> None:
    """Each statement sees what was committed before it, on the same connection."""
    with reads.connect() as connection:
        before = connection.scalar(select(func.count()).select_from(Note))
        with engine.begin() as writer:
            writer.execute(insert(Note), {"text": "new"})
        after = connection.scalar(select(func.count()).select_from(Note))

    assert (before, after) == (0, 1)


@pytest.mark.parametrize(
    "statement",
    [
        pytest.param("INSERT INTO note (text) VALUES ('x')", id="INSERT"),
        pytest.param("UPDATE note SET text = 'x'", id="UPDATE"),
        pytest.param("DELETE FROM note", id="DELETE"),
        pytest.param("CREATE TABLE other (id INTEGER)", id="CREATE TABLE"),
        pytest.param("DROP TABLE note", id="DROP TABLE"),
    ],
)
def test_a_write_is_refused_by_the_server(statement: str, engine: Engine, reads: Engine) -> None:
    """The error carries a note that names the way out, and nothing has happened."""
    with engine.begin() as connection:
        connection.execute(insert(Note), {"text": "kept"})

    with reads.connect() as connection, pytest.raises(DBAPIError) as caught:
        connection.execute(text(statement))

    assert is_refused_write(caught.value)
    assert caught.value.orig is not None
    assert is_refused_write(caught.value.orig)
    (note,) = notes(caught.value)
    assert "current_scope().read_only = False" in note
    assert count(engine) == 1


def test_a_write_is_refused_after_an_error_and_a_rollback(engine: Engine, reads: Engine) -> None:
    """What makes the connection read-only is not undone by whatever ends a transaction."""
    with reads.connect() as connection:
        with pytest.raises(DBAPIError):
            connection.execute(text("SELECT nothing FROM nowhere"))
        connection.rollback()
        connection.execute(text("SELECT 1"))
        connection.commit()
    with reads.connect() as connection, pytest.raises(DBAPIError) as caught:
        connection.execute(insert(Note), {"text": "x"})

    assert is_refused_write(caught.value)
    assert count(engine) == 0


def test_other_errors_carry_no_note(reads: Engine) -> None:
    """They have nothing to do with being read-only."""
    with reads.connect() as connection, pytest.raises(DBAPIError) as caught:
        connection.execute(text("SELECT nothing FROM nowhere"))

    assert not is_refused_write(caught.value)
    assert not hasattr(caught.value, "__notes__")


def test_what_is_not_an_error_of_the_driver_passes(reads: Engine) -> None:
    """A listener's error, say, comes out as it is."""

    def fail(*_: object) -> None:
        raise KeyError("mine")

    with reads.connect() as connection:
        event.listen(reads, "do_execute", fail)
        with pytest.raises(KeyError, match="mine"):
            connection.execute(text("SELECT :a"), {"a": 1})


def test_it_has_a_pool_of_its_own(engine: Engine, url: URL, keep: Keep) -> None:
    """Made from an engine, it shares nothing with it: the engine still writes."""
    reads = keep(read_only_engine(engine, pool_size=1))
    with reads.connect() as connection:
        connection.execute(text("SELECT 1"))
        with engine.begin() as writer:
            writer.execute(insert(Note), {"text": "x"})

    assert reads.url == engine.url == url
    assert count(engine) == 1


@pytest.mark.parametrize("level", ["SERIALIZABLE", "READ UNCOMMITTED"])
def test_the_isolation_level_cannot_be_changed(level: Any, reads: Engine) -> None:
    """A transaction would stay open, as no COMMIT and no ROLLBACK is ever sent."""
    with pytest.raises(ValueError, match=f"isolation_level must be AUTOCOMMIT .*, got '{level}'"):
        reads.execution_options(isolation_level=level)
    with reads.connect() as connection, pytest.raises(ValueError, match="must be AUTOCOMMIT"):
        connection.execution_options(isolation_level=level)
    with reads.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT", yield_per=10)


@pytest.mark.parametrize(
    "option", [{"isolation_level": "SERIALIZABLE"}, {"pool_reset_on_return": "rollback"}]
)
def test_what_it_is_made_of_cannot_be_chosen(option: dict[str, str]) -> None:
    """These two arguments are its own."""
    with pytest.raises(TypeError, match=next(iter(option))):
        read_only_engine("sqlite:///app.db", **option)


def test_options_of_the_engine_are_kept(url: URL, keep: Keep) -> None:
    """Those of ``create_engine()`` are passed on, among them execution options."""
    reads = keep(read_only_engine(url, execution_options={"mine": 1}, pool_size=3))

    assert reads.get_execution_options()["mine"] == 1
    size: Any = reads.pool
    assert size.size() == 3


# -- where a transaction is needed ----------------------------------------------------------------


@pytest.fixture(params=DRIVERS)
def postgres_reads(cluster: PostgresCluster, request: pytest.FixtureRequest, keep: Keep) -> Engine:
    empty_tables(cluster.primary.url())
    return keep(read_only_engine(cluster.primary.url(driver=request.param)))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        pytest.param({"stream_results": True}, "stream_results", id="stream_results"),
        pytest.param({"yield_per": 10}, "stream_results", id="yield_per"),
    ],
)
def test_a_cursor_of_the_server_is_a_clear_error(
    options: dict[str, Any], what: str, postgres_reads: Engine
) -> None:
    """PostgreSQL has one only in a transaction."""
    with (
        postgres_reads.connect() as connection,
        pytest.raises(InvalidRequestError, match=f"{what} .*needs a transaction.*read_only = F"),
    ):
        connection.execution_options(**options).execute(select(Note.text)).all()


def test_a_savepoint_is_a_clear_error(postgres_reads: Engine) -> None:
    """PostgreSQL has one only in a transaction."""
    with Session(postgres_reads) as session:
        with (
            pytest.raises(InvalidRequestError, match=r"begin_nested\(\) needs a transaction"),
            session.begin_nested(),
        ):
            session.scalars(select(Note.text)).all()
        session.rollback()


def test_a_statement_that_needs_a_transaction_is_a_clear_error(postgres_reads: Engine) -> None:
    """Textual SQL is no exception."""
    with (
        postgres_reads.connect() as connection,
        pytest.raises(InvalidRequestError, match="this statement needs a transaction"),
    ):
        connection.execute(text("DECLARE mine CURSOR FOR SELECT 1"))


@pytest.mark.clusters
def test_mariadb_releases_no_savepoint(mariadb_url: URL, keep: Keep) -> None:
    """It accepts one at AUTOCOMMIT, and has forgotten it right away."""
    with Session(keep(read_only_engine(mariadb_url))) as session:
        with (
            pytest.raises(InvalidRequestError, match=r"begin_nested\(\) needs a transaction"),
            session.begin_nested(),
        ):
            session.execute(text("SELECT 1"))
        session.rollback()


# -- startup parameters, and who drops them -------------------------------------------------------


@pytest.mark.parametrize(
    ("driver", "query", "connect_args"),
    [
        pytest.param("psycopg", {"options": "-c work_mem=1234kB"}, {}, id="psycopg, URL"),
        pytest.param("psycopg", {}, {"options": "-c work_mem=1234kB"}, id="psycopg, argument"),
        pytest.param("psycopg2", {"options": "-c work_mem=1234kB"}, {}, id="psycopg2, URL"),
        pytest.param(
            "psycopg",
            {"options": ("-c work_mem=1234kB", "-c geqo=off")},
            {},
            id="psycopg, URL, twice",
        ),
        pytest.param(
            "pg8000", {}, {"startup_params": {"work_mem": "1234kB"}}, id="pg8000, argument"
        ),
    ],
)
def test_other_startup_parameters_are_kept(
    driver: str,
    query: dict[str, Any],
    connect_args: dict[str, Any],
    cluster: PostgresCluster,
    keep: Keep,
) -> None:
    """Both are sent."""
    url = cluster.primary.url(driver=driver).update_query_dict(query)
    reads = keep(read_only_engine(url, connect_args=connect_args))

    with reads.connect() as connection:
        assert connection.scalar(text("SHOW work_mem")) == "1234kB"
        assert connection.scalar(text("SHOW default_transaction_read_only")) == "on"


def test_the_options_of_the_environment_are_kept(
    cluster: PostgresCluster, keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libpq would forget them as soon as it is given others."""
    monkeypatch.setenv("PGOPTIONS", "-c work_mem=1234kB")

    with keep(read_only_engine(cluster.primary.url())).connect() as connection:
        assert connection.scalar(text("SHOW work_mem")) == "1234kB"


@pytest.mark.clusters
@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("ignores", [True, False], ids=["ignores it", "refuses it"])
def test_a_pooler_that_drops_the_parameter_is_refused(
    driver: str, ignores: bool, cluster: PostgresCluster, keep: Keep
) -> None:
    """Otherwise the writes of a "read-only" pool would take place: seen with PgBouncer."""
    settings = {"ignore_startup_parameters": "options,default_transaction_read_only"}
    with pgbouncer(cluster.primary.url(), **(settings if ignores else {})) as bouncer:
        reads = keep(read_only_engine(bouncer.url(driver=driver)))
        with pytest.raises(RuntimeError, match=r"pooler.*Connect to the server itself"):
            reads.connect()


# -- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_a_sqlite_database_in_memory_is_refused(url: str) -> None:
    """A second connection would see another database."""
    with pytest.raises(ValueError, match="must not be a SQLite database in memory, got 'sqlite:"):
        read_only_engine(url)


def test_a_database_that_cannot_enforce_it_is_refused() -> None:
    """Without the server's help a write would take place."""
    with pytest.raises(ValueError, match=r"must be one of postgresql, .*, got 'oracle://a:\*\*\*"):
        read_only_engine("oracle://a:secret@host/db")


def test_the_answer_of_a_pooler_is_explained(keep: Keep) -> None:
    """PgBouncer's, where none is installed."""

    def creator() -> None:
        raise psycopg.OperationalError("FATAL:  unsupported startup parameter: options")

    reads = keep(read_only_engine("postgresql+psycopg://", creator=creator))

    with pytest.raises(RuntimeError, match=r"a pooler refuses .*Connect to the server") as caught:
        reads.connect()
    assert isinstance(caught.value.__cause__, psycopg.OperationalError)


def test_other_errors_of_a_connection_pass(keep: Keep) -> None:
    """A server that is down is no pooler."""
    reads = keep(read_only_engine("postgresql+psycopg://postgres@127.0.0.1:1/postgres"))

    with pytest.raises(OperationalError):
        reads.connect()


def test_a_connection_that_is_not_read_only_is_refused(
    cluster: PostgresCluster, keep: Keep
) -> None:
    """Each new connection is asked, wherever it comes from."""

    def creator() -> psycopg.Connection[Any]:
        return psycopg.connect(
            host=cluster.primary.host, port=cluster.primary.port, user="postgres"
        )

    reads = keep(read_only_engine("postgresql+psycopg://", creator=creator))

    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"must be on .*, got 'off'.*PgBouncer"):
            reads.connect()


def test_the_role_may_have_the_setting(cluster: PostgresCluster, keep: Keep) -> None:
    """What counts is the server's answer: behind a pooler, that is the way."""
    cluster.primary.fetch("CREATE ROLE reader LOGIN")
    cluster.primary.fetch("ALTER ROLE reader SET default_transaction_read_only = on")

    def creator() -> psycopg.Connection[Any]:
        return psycopg.connect(
            host=cluster.primary.host,
            port=cluster.primary.port,
            user="reader",
            dbname="postgres",
        )

    reads = keep(read_only_engine("postgresql+psycopg://", creator=creator))

    with reads.connect() as connection:
        assert connection.scalar(text("SELECT current_user")) == "reader"
