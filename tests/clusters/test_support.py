"""The network in between and the clusters do what the suites that use them rely on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest
from sqlalchemy import bindparam, create_engine, text
from sqlalchemy.exc import DBAPIError

from tests.support.clusters import postgres_cluster
from tests.support.galera import mariadb
from tests.support.processes import REQUIRED, free_port, require, wait_until
from tests.support.proxy import Proxy
from tests.support.sweeper import running

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator

    from sqlalchemy import URL, Engine

    from tests.support.clusters import PostgresCluster

pytestmark = pytest.mark.clusters

DRIVERS = ["psycopg", "psycopg2", "pg8000", "pymysql"]
# In a transaction of one SELECT with a parameter, once the driver has seen the statement. pg8000
# parses, describes and executes in three.
ROUND_TRIPS = {"psycopg": 3, "psycopg2": 3, "pg8000": 7, "pymysql": 3}


@pytest.fixture(scope="module")
def cluster() -> Iterator[PostgresCluster]:
    """A primary with two standbys."""
    with postgres_cluster(2) as made:
        made.primary.fetch("CREATE TABLE note (text text)")
        yield made


@pytest.fixture(scope="module")
def mariadb_url() -> Iterator[URL]:
    """A MariaDB server of the module's own."""
    with mariadb() as server:
        server.fetch("CREATE TABLE test.note (text text)")
        yield server.url()


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def url(driver: str, request: pytest.FixtureRequest) -> URL:
    if driver == "pymysql":
        found: URL = request.getfixturevalue("mariadb_url")
        return found
    cluster: PostgresCluster = request.getfixturevalue("cluster")
    return cluster.primary.url(driver=driver)


@pytest.fixture
def proxy(url: URL) -> Iterator[Proxy]:
    with Proxy.to(url) as made:
        yield made


@pytest.fixture
def engine(url: URL, proxy: Proxy) -> Iterator[Engine]:
    engine = create_engine(proxy.url(url))
    yield engine
    engine.dispose()


def count(url: URL, value: str) -> int:
    engine = create_engine(url)
    with engine.connect() as connection:
        found: int = connection.execute(
            text("SELECT count(*) FROM note WHERE text = :value"), {"value": value}
        ).scalar_one()
    engine.dispose()
    return found


def select(engine: Engine, statements: int = 1) -> None:
    with engine.begin() as connection:
        for _ in range(statements):
            connection.execute(text("SELECT :a").bindparams(bindparam("a", "one")))


def test_the_proxy_counts_round_trips(driver: str, engine: Engine, proxy: Proxy) -> None:
    """Each wait for an answer counts once; logging in does not count."""
    select(engine)  # SQLAlchemy's questions to a new server
    proxy.reset()

    select(engine)

    assert proxy.round_trips() == ROUND_TRIPS[driver]
    assert proxy.sent() >= proxy.round_trips()
    assert proxy.received() >= proxy.round_trips()
    assert proxy.connections == 1


def test_the_proxy_delays_each_direction(driver: str, engine: Engine, proxy: Proxy) -> None:
    """Every round trip costs the delay twice, at least."""
    select(engine)
    proxy.delay = 0.05
    start = time.monotonic()

    select(engine)

    assert time.monotonic() - start >= ROUND_TRIPS[driver] * 0.1


@pytest.mark.parametrize(("how", "expected"), [("eat_commit_answer", 1), ("eat_commit", 0)])
def test_the_proxy_loses_a_commit_or_its_answer(
    how: str, expected: int, driver: str, engine: Engine, proxy: Proxy, url: URL
) -> None:
    """The client sees a broken connection; the row is there, or it is not."""
    select(engine)
    lost: threading.Event = getattr(proxy, how)()
    value = f"{driver} {how}"

    with pytest.raises(DBAPIError), engine.begin() as connection:
        connection.execute(text("INSERT INTO note VALUES (:value)"), {"value": value})

    assert lost.wait(30)
    assert count(url, value) == expected
    select(engine)  # once only


def test_the_proxy_breaks_and_refuses_connections(engine: Engine, proxy: Proxy) -> None:
    """What is connected is cut, what is not connected is refused, until it listens again."""
    select(engine)
    proxy.refuse()
    select(engine)
    assert proxy.cut() == 1
    for _ in range(2):
        with pytest.raises(DBAPIError):
            select(engine)
    proxy.listen()
    select(engine)


def test_requests_that_are_sent_together_are_one_round_trip(cluster: PostgresCluster) -> None:
    """Psycopg's pipeline is one; two statements in one text are one."""
    with Proxy.to(cluster.primary.url()) as proxy:
        connection = psycopg.connect(
            host=proxy.host, port=proxy.port, user="postgres", autocommit=True
        )
        with connection:
            proxy.reset()
            with connection.pipeline():
                connection.execute("SELECT 1")
                connection.execute("SELECT 2")
            assert proxy.round_trips() == 1
            connection.execute("SELECT 1; SELECT 2")
            assert proxy.round_trips() == 2


def test_a_standby_can_be_paused_promoted_and_followed(cluster: PostgresCluster) -> None:
    """What the tests of replicas and of failovers stand on."""
    primary, (one, two) = cluster.primary, cluster.standbys
    cluster.synchronous(one)
    cluster.wait_caught_up()
    query = "SELECT count(*) FROM note WHERE text = 'standby'"
    one.pause_replay()
    primary.fetch("INSERT INTO note VALUES ('standby')")
    cluster.wait_caught_up(two)
    assert (one.value(query), two.value(query)) == (0, 1)
    one.resume_replay()
    cluster.wait_caught_up()
    assert one.value(query) == 1

    primary.kill()
    one.promote()
    cluster.follow(two, one)
    one.fetch("INSERT INTO note VALUES ('standby')")

    wait_until(lambda: two.value(query) == 2, "the other standby follows")
    primary.start()
    cluster.synchronous()
    assert (primary.value(query), primary.is_in_recovery()) == (1, False)


def test_servers_end_although_the_tests_were_killed(tmp_path: Path) -> None:
    """A worker that is killed leaves neither a process nor a directory."""
    program = (
        "import signal, sys\n"
        "from tests.support.clusters import postgres_cluster\n"
        "with postgres_cluster(0) as cluster:\n"
        "    print(cluster.primary.data.parent, flush=True)\n"
        "    signal.pause()\n"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
        cwd=root,
        text=True,
    ) as process:
        assert process.stdout is not None
        directory = Path(process.stdout.readline().strip())
        assert directory.name.startswith("wsgi-dbsession-postgres-")
        assert running(directory)
        process.send_signal(signal.SIGKILL)

    wait_until(lambda: not directory.exists(), "the directory is gone")
    assert not running(directory)


def test_a_missing_program_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test is skipped by name, or fails where the packages are required."""
    monkeypatch.delenv(REQUIRED, raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"no-such-program.*apt-get install nothing"):
        require("no-such-program", "nothing")
    monkeypatch.setenv(REQUIRED, "1")
    with pytest.raises(pytest.fail.Exception, match=r"no-such-program.*apt-get install nothing"):
        require("no-such-program", "nothing")


def test_free_ports_are_not_those_of_clients() -> None:
    """Or a server could not be started again on its port."""
    assert all(port < 32_768 for port in (free_port() for _ in range(20)))
