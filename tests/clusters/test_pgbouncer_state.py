"""What a client sets on a connection to PgBouncer in transaction mode, other clients get.

Each of these is a fact that ``docs/pgbouncer.md`` warns of, with the way out that it names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, OperationalError, ProgrammingError

from tests.support.clusters import PgBouncer, PostgresCluster, pgbouncer, postgres_cluster
from wsgi_dbsession._pooler import warn_behind_pooler

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection, Engine

    from tests.clusters.conftest import MakeEngine

pytestmark = pytest.mark.clusters

UNPREPARED = {"prepare_threshold": None}
DRIVERS = ["psycopg", "psycopg2", "pg8000"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[PostgresCluster]:
    with postgres_cluster(0) as made:
        made.primary.fetch("CREATE TABLE note (text text)")
        made.primary.fetch("CREATE TABLE other (text text)")
        yield made


@pytest.fixture
def bouncer(cluster: PostgresCluster) -> Iterator[PgBouncer]:
    """A bouncer with one backend, that all clients share, one after the other."""
    cluster.primary.fetch("TRUNCATE note, other")
    with pgbouncer(cluster.primary.url(), default_pool_size="1") as made:
        yield made


@pytest.fixture
def other(bouncer: PgBouncer, make_engine: MakeEngine) -> Engine:
    """Another client, that has set nothing."""
    return make_engine(bouncer.url(), connect_args=UNPREPARED)


def options_of(driver: str) -> dict[str, Any]:
    return {"connect_args": UNPREPARED} if driver == "psycopg" else {}


def value(engine: Engine, statement: str) -> Any:
    with engine.connect() as connection:
        return connection.scalar(text(statement))


# -- prepared statements --------------------------------------------------------------------------


def prepare(connection: Connection, statement: str) -> None:
    """Run a statement as often as it takes until psycopg prepares it."""
    for number in range(6):
        connection.execute(text(statement), {"value": f"{statement} {number}"})
        connection.commit()


def test_prepared_statements_collide(bouncer: PgBouncer, make_engine: MakeEngine) -> None:
    """By its default, psycopg prepares what is run a sixth time, as ``_pg3_0`` in each client."""
    one, two = (make_engine(bouncer.url()) for _ in range(2))

    with one.connect() as connection:
        prepare(connection, "INSERT INTO note VALUES (:value)")
    with two.connect() as connection, pytest.raises(ProgrammingError, match="already exists"):
        prepare(connection, "INSERT INTO other VALUES (:value)")


def test_the_default_is_a_warning_at_the_first_connect(
    cluster: PostgresCluster,
    bouncer: PgBouncer,
    make_engine: MakeEngine,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Only behind the bouncer, and only with the default."""
    warn_behind_pooler()  # as whatever adopts a registry does
    for url, options in (
        (bouncer.url(), {"connect_args": UNPREPARED}),
        (bouncer.url(driver="psycopg2"), {}),
        (cluster.primary.url(), {}),
    ):
        assert value(make_engine(url, **options), "SELECT 1") == 1
    assert not caplog.records

    engine = make_engine(bouncer.url())
    assert value(engine, "SELECT 1") == value(engine, "SELECT 1") == 1

    (record,) = caplog.records
    assert record.getMessage().startswith("a pooler such as PgBouncer is between psycopg and")


def backend(connection: Connection) -> int:
    """Return the backend of a connection, which is its own until the transaction ends."""
    pid: int = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
    return pid


def write_on_swapped_backends(
    cluster: PostgresCluster, make_engine: MakeEngine, **options: Any
) -> tuple[list[str], list[str]]:
    """Let two clients prepare on a backend each, and then let one run on the other's.

    :return: What the two tables have in the end; the second client's last row is "mine".
    """
    cluster.primary.fetch("TRUNCATE note, other")
    with pgbouncer(cluster.primary.url(), default_pool_size="2") as bouncer:
        one, two = (make_engine(bouncer.url(), **options) for _ in range(2))
        blocker = make_engine(bouncer.url(), connect_args=UNPREPARED)
        with (
            one.connect() as first,
            two.connect() as second,
            blocker.connect() as block,
            blocker.connect() as other_block,
        ):
            holders = {backend(each): each for each in (block, other_block)}
            (first_pid, first_block), (second_pid, second_block) = holders.items()
            # Each client prepares on the backend that the other transaction leaves to it. No
            # rollback: after one, psycopg forgets what it has prepared.
            first_block.rollback()
            prepare(first, "INSERT INTO note VALUES (:value)")
            assert backend(first) == first_pid
            first.commit()
            assert backend(first_block) == first_pid
            second_block.rollback()
            prepare(second, "INSERT INTO other VALUES (:value)")
            assert backend(second) == second_pid
            second.commit()
            assert backend(second_block) == second_pid
            # Now the second one gets the first one's.
            first_block.rollback()
            second.execute(text("INSERT INTO other VALUES (:value)"), {"value": "mine"})
            assert backend(second) == first_pid
            second.commit()
    notes, others = (
        [row[0] for row in cluster.primary.fetch(f"SELECT text FROM {table}")]
        for table in ("note", "other")
    )
    return notes, others


def test_another_clients_statement_runs_in_silence(
    cluster: PostgresCluster, make_engine: MakeEngine
) -> None:
    """Both backends have a ``_pg3_0``: the row goes into the other's table, without an error."""
    notes, others = write_on_swapped_backends(cluster, make_engine)

    assert "mine" in notes
    assert "mine" not in others


def test_without_a_prepare_threshold_each_client_runs_its_own(
    cluster: PostgresCluster, make_engine: MakeEngine
) -> None:
    """The same with ``prepare_threshold=None``."""
    notes, others = write_on_swapped_backends(cluster, make_engine, connect_args=UNPREPARED)

    assert "mine" not in notes
    assert "mine" in others


@pytest.mark.parametrize("driver", ["psycopg2", "pg8000"])
def test_the_other_drivers_prepare_nothing_that_lasts(
    driver: str, bouncer: PgBouncer, make_engine: MakeEngine
) -> None:
    """They need no option."""
    for table in ("note", "other"):
        with make_engine(bouncer.url(driver=driver)).connect() as connection:
            prepare(connection, f"INSERT INTO {table} VALUES (:value)")

    assert value(make_engine(bouncer.url(driver=driver)), "SELECT count(*) FROM other") == 6


# -- isolation levels -----------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_the_isolation_level_belongs_to_the_transaction(
    driver: str, bouncer: PgBouncer, other: Engine, make_engine: MakeEngine
) -> None:
    """These drivers send it with each BEGIN."""
    engine = make_engine(
        bouncer.url(driver=driver), isolation_level="SERIALIZABLE", **options_of(driver)
    )

    for _ in range(10):
        assert value(engine, "SHOW transaction_isolation") == "serializable"
        assert value(other, "SHOW transaction_isolation") == "read committed"


def test_the_isolation_level_of_pg8000_is_everybodys(
    bouncer: PgBouncer, other: Engine, make_engine: MakeEngine
) -> None:
    """It is set once for the session, so the others have it, until the backend is replaced."""
    engine = make_engine(bouncer.url(driver="pg8000"), isolation_level="SERIALIZABLE")

    assert value(engine, "SHOW transaction_isolation") == "serializable"
    assert value(other, "SHOW transaction_isolation") == "serializable"

    bouncer.admin("RECONNECT")
    bouncer.admin("WAIT_CLOSE")
    assert value(engine, "SHOW transaction_isolation") == "read committed"


def test_pg8000_can_set_the_level_in_each_transaction(
    bouncer: PgBouncer, other: Engine, make_engine: MakeEngine
) -> None:
    """The way out: an event."""
    engine = make_engine(bouncer.url(driver="pg8000"))

    @event.listens_for(engine, "begin")
    def set_level(connection: Connection) -> None:
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")

    for _ in range(5):
        assert value(engine, "SHOW transaction_isolation") == "serializable"
        assert value(other, "SHOW transaction_isolation") == "read committed"


@pytest.mark.parametrize("driver", DRIVERS)
def test_the_level_of_the_database_holds_for_each_client(
    driver: str, cluster: PostgresCluster, bouncer: PgBouncer, make_engine: MakeEngine
) -> None:
    """The other way out, for all drivers."""
    engine = make_engine(bouncer.url(driver=driver), **options_of(driver))
    primary = cluster.primary
    primary.fetch("ALTER DATABASE postgres SET default_transaction_isolation = 'repeatable read'")
    try:
        bouncer.admin("RECONNECT")
        bouncer.admin("WAIT_CLOSE")
        assert value(engine, "SHOW transaction_isolation") == "repeatable read"
    finally:
        primary.fetch("ALTER DATABASE postgres RESET default_transaction_isolation")


@pytest.mark.parametrize("driver", DRIVERS)
def test_read_only_transactions_hold(
    driver: str, bouncer: PgBouncer, other: Engine, make_engine: MakeEngine
) -> None:
    """The execution option makes each transaction of its engine read-only, and no other."""
    engine = make_engine(bouncer.url(driver=driver), **options_of(driver))
    reading = engine.execution_options(postgresql_readonly=True)

    with reading.connect() as connection, pytest.raises(DBAPIError, match="read-only"):
        connection.execute(text("INSERT INTO note VALUES ('note')"))

    assert value(other, "SHOW transaction_read_only") == "off"


# -- what SET and its like leave behind -----------------------------------------------------------


@pytest.mark.parametrize(
    ("leave", "look", "seen"),
    [
        pytest.param("SET statement_timeout = '7s'", "SHOW statement_timeout", "7s", id="SET"),
        pytest.param(
            "SET LOCAL statement_timeout = '7s'", "SHOW statement_timeout", "0", id="SET LOCAL"
        ),
        pytest.param(
            "SELECT set_config('search_path', 'nowhere', false)",
            "SHOW search_path",
            "nowhere",
            id="search_path",
        ),
        pytest.param("SET ROLE pg_monitor", "SELECT current_user", "pg_monitor", id="SET ROLE"),
        pytest.param(
            "CREATE TEMPORARY TABLE scratch AS SELECT 'theirs' AS text",
            "SELECT text FROM scratch",
            "theirs",
            id="temporary table",
        ),
        pytest.param(
            "CREATE TEMPORARY TABLE scratch ON COMMIT DROP AS SELECT 1",
            "SELECT to_regclass('scratch')",
            None,
            id="temporary table, dropped",
        ),
        pytest.param(
            "SELECT pg_advisory_lock(1)",
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()",
            1,
            id="advisory lock",
        ),
        pytest.param(
            "SELECT pg_advisory_xact_lock(1)",
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()",
            0,
            id="advisory lock of the transaction",
        ),
    ],
)
def test_what_outlasts_a_transaction_is_the_next_clients(
    leave: str, look: str, seen: object, bouncer: PgBouncer, other: Engine, make_engine: MakeEngine
) -> None:
    """What belongs to the transaction is gone with it."""
    engine = make_engine(bouncer.url(), connect_args=UNPREPARED)
    with engine.begin() as connection:
        connection.execute(text(leave))

    assert value(other, look) == seen


# -- options --------------------------------------------------------------------------------------

READ_ONLY = {"options": "-c default_transaction_read_only=on", **UNPREPARED}


def test_options_are_refused(bouncer: PgBouncer, make_engine: MakeEngine) -> None:
    """The parameter is one that PgBouncer does not pass on."""
    engine = make_engine(bouncer.url(), connect_args=READ_ONLY)

    with pytest.raises(OperationalError, match="unsupported startup parameter"):
        engine.connect()


def test_ignored_options_are_ignored(cluster: PostgresCluster, make_engine: MakeEngine) -> None:
    """With ``ignore_startup_parameters`` a pool that was meant to be read-only writes."""
    cluster.primary.fetch("TRUNCATE note")
    with pgbouncer(cluster.primary.url(), ignore_startup_parameters="options") as bouncer:
        engine = make_engine(bouncer.url(), connect_args=READ_ONLY)

        with engine.begin() as connection:
            connection.execute(text("INSERT INTO note VALUES ('written')"))

        engine.dispose()
    assert cluster.primary.fetch("SELECT text FROM note") == [("written",)]
