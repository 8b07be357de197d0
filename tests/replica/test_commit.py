"""COMMIT and the position after it, with each driver: the truth, whatever happens in between."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import psycopg
import psycopg2.extras
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from tests.replica.conftest import DRIVERS
from tests.replica.tables import empty_tables
from tests.support.processes import wait_until
from tests.support.proxy import Proxy
from wsgi_dbsession.replica import _commit
from wsgi_dbsession.replica._commit import Commit
from wsgi_dbsession.replica._position import NOWHERE, Position

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Engine

    from tests.support.clusters import PostgresCluster

    Keep = Callable[[Engine], Engine]

pytestmark = pytest.mark.xdist_group("replica")

ONCE = "CREATE TABLE IF NOT EXISTS once (x int UNIQUE DEFERRABLE INITIALLY DEFERRED)"
INSERT = text("INSERT INTO note (text) VALUES ('x')")


class Committing:
    """An engine whose commits go through :class:`Commit`, which notes the positions."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.positions: list[Position | None] = []
        commit = Commit(engine)
        dialect: Any = engine.dialect
        usual = dialect.do_commit

        def do_commit(connection: Any) -> None:
            driver = connection.dbapi_connection
            self.positions.append(commit(driver, lambda: usual(connection)))

        dialect.do_commit = do_commit

    def run(self, *statements: Any) -> Position | None:
        """Run statements in a transaction, and return the position after it."""
        with self.engine.begin() as connection:
            for statement in statements:
                connection.execute(statement)
        return self.positions[-1]


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def committing(cluster: PostgresCluster, driver: str, keep: Keep) -> Committing:
    url = cluster.primary.url(driver=driver)
    empty_tables(url)
    made = Committing(keep(create_engine(url)))
    made.run(text("SELECT 1"))  # SQLAlchemy's questions to a new server
    return made


def notes(cluster: PostgresCluster) -> int:
    count: int = cluster.primary.value("SELECT count(*) FROM note")
    return count


def place(cluster: PostgresCluster, function: str) -> Position:
    return Position.read(1, cluster.primary.value(f"SELECT {function}()::text"))


def test_a_write_has_a_position_that_covers_it(
    committing: Committing, cluster: PostgresCluster
) -> None:
    """A standby that has replayed up to there has the row."""
    before = place(cluster, "pg_current_wal_flush_lsn")

    position = committing.run(INSERT)

    assert position is not None
    assert position.covers(before)
    assert position != before
    (standby, *_) = cluster.standbys
    wait_until(
        lambda: Position.read(1, standby.value("SELECT pg_last_wal_replay_lsn()::text")).covers(
            position
        ),
        "the standby replays the write",
    )
    assert standby.value("SELECT count(*) FROM note") == 1


def test_a_read_has_none(committing: Committing) -> None:
    """There is nothing that a later read could miss."""
    assert committing.run(text("SELECT * FROM note")) is None


def test_a_savepoint_that_is_rolled_back_may_have_one(committing: Committing) -> None:
    """What was written before it counts."""
    with committing.engine.begin() as connection:
        connection.execute(INSERT)
        savepoint = connection.begin_nested()
        connection.execute(INSERT)
        savepoint.rollback()

    assert committing.positions[-1] not in (None, NOWHERE)


def test_nothing_was_begun(driver: str, cluster: PostgresCluster, keep: Keep) -> None:
    """A transaction without a statement asks the server nothing more than usual."""
    url = cluster.primary.url(driver=driver)
    with Proxy.to(url) as proxy:
        committing = Committing(keep(create_engine(proxy.url(url))))
        committing.run(text("SELECT 1"))
        proxy.reset()

        assert committing.run() is None

        # pg8000 does not know, so it sends its COMMIT as ever.
        assert proxy.round_trips() == (1 if driver == "pg8000" else 0)


@pytest.mark.parametrize("setting", ["SET", "SET LOCAL"])
def test_a_commit_that_does_not_wait_has_the_position_of_its_record(
    setting: str, committing: Committing, cluster: PostgresCluster
) -> None:
    """With ``synchronous_commit=off`` it is written to the disk later."""
    with committing.engine.connect() as connection:
        for _ in range(20):
            connection.execute(text(f"{setting} synchronous_commit = off"))
            connection.execute(INSERT)
            inserted = Position.read(
                1, connection.scalar(text("SELECT pg_current_wal_insert_lsn()::text"))
            )
            connection.commit()
            position = committing.positions[-1]
            assert position is not None
            assert position.covers(inserted)
            assert position.lsn > inserted.lsn
        connection.execute(text("SET synchronous_commit = on"))
        connection.commit()


def test_a_failing_commit_raises_what_it_always_does(
    committing: Committing, cluster: PostgresCluster
) -> None:
    """Nothing is committed, and the connection is good for the next transaction."""
    cluster.primary.fetch(ONCE)
    twice = text("INSERT INTO once VALUES (1), (1)")
    plain = create_engine(committing.engine.url)
    with pytest.raises(DBAPIError) as usual, plain.begin() as connection:
        connection.execute(twice)
    plain.dispose()

    with pytest.raises(DBAPIError) as caught:
        committing.run(INSERT, twice)

    assert type(caught.value) is type(usual.value)
    assert isinstance(caught.value, IntegrityError) or committing.engine.driver == "pg8000"
    assert type(caught.value.orig) is type(usual.value.orig)
    assert notes(cluster) == 0
    assert committing.run(INSERT) not in (None, NOWHERE)


def test_a_swallowed_error_is_left_to_the_driver(
    committing: Committing, cluster: PostgresCluster
) -> None:
    """The transaction is aborted. Its COMMIT is the same as ever: pg8000 raises, others do not."""
    committing.positions.clear()
    with committing.engine.connect() as connection:
        connection.execute(INSERT)
        with pytest.raises(DBAPIError):
            connection.execute(text("SELECT nothing"))
        if committing.engine.driver == "pg8000":
            with pytest.raises(DBAPIError, match="in failed transaction block"):
                connection.commit()
        else:
            connection.commit()

    assert not any(committing.positions)
    assert notes(cluster) == 0


class Interruption(BaseException):
    """What kills a greenlet, or a worker."""


@pytest.mark.parametrize("kind", [Interruption, KeyError])
@pytest.mark.parametrize("driver", ["psycopg", "pg8000"])  # psycopg2 waits where Python does not
def test_an_interruption_comes_through(
    kind: type[BaseException], committing: Committing, cluster: PostgresCluster
) -> None:
    """A COMMIT waits for another transaction, and a signal or gevent's Timeout ends that."""

    def interrupt(*_: object) -> None:
        raise kind("interrupted")

    statement = text("INSERT INTO once VALUES (7)")
    cluster.primary.fetch(f"DROP TABLE IF EXISTS once; {ONCE}")
    before = signal.signal(signal.SIGUSR1, interrupt)
    connection = committing.engine.connect()
    try:
        with cluster.primary.connect() as other, other.transaction(force_rollback=True):
            other.execute("INSERT INTO once VALUES (7)")
            connection.execute(statement)
            timer = threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGUSR1])
            timer.start()
            with pytest.raises(kind, match="interrupted"):
                connection.commit()
            timer.join()
            connection.invalidate()
    finally:
        signal.signal(signal.SIGUSR1, before)
        connection.close()

    assert committing.run(INSERT) not in (None, NOWHERE)


def test_a_failing_commit_may_come_while_an_error_is_handled(
    committing: Committing, cluster: PostgresCluster
) -> None:
    """That error is not the reason."""
    cluster.primary.fetch(ONCE)
    try:
        raise KeyError("handled")
    except KeyError:
        with pytest.raises(DBAPIError):
            committing.run(text("INSERT INTO once VALUES (1), (1)"))


# -- what comes after COMMIT, and fails -----------------------------------------------------------


def fail_with(monkeypatch: pytest.MonkeyPatch, expression: str) -> None:
    """Let an expression be a part of the question for the position."""
    after = f"SELECT * FROM (SELECT ({expression})::text) one, ({_commit._AFTER}) position"
    monkeypatch.setattr(_commit, "_BATCH", _commit._BATCH.replace(_commit._AFTER, after))
    monkeypatch.setattr(_commit, "_AFTER", after)


def test_an_error_after_commit_is_not_one_of_it(
    committing: Committing, cluster: PostgresCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is committed never looks failed. Its client reads from the primary for a while."""
    fail_with(monkeypatch, "1 / (SELECT 0 * count(*) FROM note)")

    assert committing.run(INSERT) == NOWHERE
    assert notes(cluster) == 1
    monkeypatch.undo()
    assert committing.run(INSERT) not in (None, NOWHERE)
    assert notes(cluster) == 2


def test_a_cancellation_after_commit_is_not_one_of_it(
    committing: Committing, cluster: PostgresCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator's ``pg_cancel_backend()`` comes just then."""
    fail_with(monkeypatch, "SELECT pg_sleep(60)")
    canceller = threading.Thread(target=interrupt, args=(cluster, "pg_cancel_backend"))
    canceller.start()

    position = committing.run(INSERT)

    canceller.join()
    assert position == NOWHERE
    assert notes(cluster) == 1


def test_a_connection_that_breaks_after_commit_is_unknown_at_worst(
    committing: Committing, cluster: PostgresCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It never looks as if the database had refused; psycopg knows even more."""
    fail_with(monkeypatch, "SELECT pg_sleep(60)")
    killer = threading.Thread(target=interrupt, args=(cluster, "pg_terminate_backend"))
    killer.start()

    if committing.engine.driver == "psycopg":
        assert committing.run(INSERT) == NOWHERE
    else:
        with pytest.raises(DBAPIError) as caught:
            committing.run(INSERT)
        assert caught.value.connection_invalidated
    killer.join()
    assert notes(cluster) == 1
    monkeypatch.undo()
    with committing.engine.connect() as connection:
        connection.invalidate()
    assert committing.run(INSERT) not in (None, NOWHERE)


def interrupt(cluster: PostgresCluster, function: str) -> None:
    """Interrupt the connection that sleeps, once what it has written is committed."""
    wait_until(
        lambda: cluster.primary.fetch(
            f"SELECT {function}(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
            " AND wait_event = 'PgSleep' AND EXISTS (SELECT FROM note)"
        ),
        "a connection sleeps after its COMMIT",
    )


def test_the_connection_of_psycopg2_may_break_even_later(
    cluster: PostgresCluster, keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the COMMIT by which the driver ends what it takes for its transaction."""
    empty_tables(cluster.primary.url())
    way = Commit._psycopg2

    def break_it(self: Commit, driver: Any, statement: str) -> Any:
        row = way(self, driver, statement)
        cluster.primary.fetch("SELECT pg_terminate_backend(%s)", driver.info.backend_pid)
        return row

    monkeypatch.setattr(Commit, "_psycopg2", break_it)
    committing = Committing(keep(create_engine(cluster.primary.url(driver="psycopg2"))))
    with committing.engine.connect() as connection:
        connection.execute(INSERT)
        connection.commit()
        assert committing.positions[-1] not in (None, NOWHERE)
        connection.invalidate()

    assert notes(cluster) == 1


# -- modes ----------------------------------------------------------------------------------------


def test_at_autocommit_it_is_not_known_whether_something_was_written(
    committing: Committing, cluster: PostgresCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So there is always a position."""
    with committing.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(INSERT)
        inserted = place(cluster, "pg_current_wal_flush_lsn")
        connection.commit()
        position = committing.positions[-1]
        fail_with(monkeypatch, "1 / (SELECT 0 * count(*) FROM note)")
        connection.execute(INSERT)
        connection.commit()

    assert position is not None
    assert position.covers(inserted)
    assert position != NOWHERE
    assert committing.positions[-1] == NOWHERE


@pytest.mark.parametrize("driver", ["psycopg", "pg8000"])
def test_a_time_out_after_autocommit_comes_through(
    committing: Committing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the next statement on this connection would read the answer that is on its way."""

    def time_out(*_: object) -> None:
        raise KeyError("timed out")

    fail_with(monkeypatch, "pg_sleep(1)")
    before = signal.signal(signal.SIGALRM, time_out)
    connection = committing.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
    try:
        connection.execute(INSERT)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyError, match="timed out"):
            connection.commit()
        connection.invalidate()
    finally:
        signal.signal(signal.SIGALRM, before)
        connection.close()


def test_a_standby_has_no_position(cluster: PostgresCluster, driver: str, keep: Keep) -> None:
    """The primary's address may lead to a server that is being replaced."""
    (standby, *_) = cluster.standbys
    committing = Committing(keep(create_engine(standby.url(driver=driver))))

    assert committing.run(text("SELECT 1")) is None
    with committing.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("SELECT 1"))
        connection.commit()
    assert committing.positions[-1] == NOWHERE


@pytest.mark.parametrize(
    ("driver", "chosen"),
    [
        pytest.param("psycopg", {"row_factory": psycopg.rows.dict_row}, id="psycopg, rows"),
        pytest.param("psycopg", {"cursor_factory": psycopg.ClientCursor}, id="psycopg, cursors"),
        pytest.param(
            "psycopg2",
            {"cursor_factory": psycopg2.extras.RealDictCursor},
            id="psycopg2, cursors",
        ),
    ],
)
def test_the_cursors_of_the_application_do_not_matter(
    driver: str, chosen: dict[str, Any], cluster: PostgresCluster, keep: Keep
) -> None:
    """Some do not know pipelines, and some rows are no tuples."""
    committing = Committing(keep(create_engine(cluster.primary.url(driver=driver))))
    committing.run(text("SELECT 1"))
    with committing.engine.connect() as connection:
        for name, value in chosen.items():
            setattr(connection.connection.dbapi_connection, name, value)
        connection.exec_driver_sql("INSERT INTO note (text) VALUES ('x')")
        connection.commit()

    assert committing.positions[-1] not in (None, NOWHERE)


@pytest.mark.parametrize(("driver", "more"), [("psycopg", 0), ("psycopg2", 1), ("pg8000", -2)])
def test_the_position_costs_no_round_trip_where_the_driver_allows(
    driver: str, more: int, cluster: PostgresCluster, keep: Keep
) -> None:
    """With psycopg2 it costs one; pg8000 saves two, because it asks three times for a COMMIT."""
    url = cluster.primary.url(driver=driver)
    with Proxy.to(url) as proxy:
        plain = keep(create_engine(proxy.url(url)))
        committing = Committing(keep(create_engine(proxy.url(url))))
        for engine in (plain, committing.engine):
            with engine.begin() as connection:
                connection.execute(INSERT)
        counts = []
        for engine in (plain, committing.engine):
            with engine.connect() as connection:
                connection.execute(INSERT)
                proxy.reset()
                connection.commit()
                counts.append(proxy.round_trips())

    assert counts[1] - counts[0] == more
    assert committing.positions[-1] is not None


# -- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["sqlite:///app.db", "mysql+pymysql://host/db"])
def test_another_database_is_refused(url: str) -> None:
    """Its positions are not known here."""
    with pytest.raises(ValueError, match="primary must be an engine of PostgreSQL with psycopg"):
        Commit(create_engine(url))


def test_another_driver_is_refused() -> None:
    """It is found when the application is built."""
    engine = create_engine("postgresql+psycopg://host/db")
    engine.dialect.driver = "other"

    with pytest.raises(ValueError, match="psycopg, psycopg2 or pg8000, got Engine"):
        Commit(engine)


def test_a_psycopg_without_pipelines_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libpq before version 14 has none."""
    monkeypatch.setattr(psycopg.Pipeline, "is_supported", lambda: False)

    with pytest.raises(ValueError, match="psycopg must have libpq 14 or later, got"):
        Commit(create_engine("postgresql+psycopg://host/db"))
