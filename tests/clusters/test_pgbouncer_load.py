"""A bank behind PgBouncer, of which the backends and the bouncer itself are killed under load."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import pytest

from tests.clusters.bank import ACKNOWLEDGED, ROLLED_BACK, Bank, Load, audit
from tests.support.clusters import PgBouncer, PostgresServer, pgbouncer, postgres_cluster

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.clusters.conftest import MakeRegistry

pytestmark = [
    pytest.mark.clusters,
    # pg8000 leaves its socket to the collector if the server goes while it connects.
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in. <socket.socket:pytest.PytestUnraisableExceptionWarning"
    ),
]

OPTIONS: dict[str, dict[str, Any]] = {
    "psycopg": {"connect_args": {"prepare_threshold": None}},
    "psycopg2": {},
    "pg8000": {},
}
KILLS = 6
CLIENTS = 8


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with postgres_cluster(0) as cluster:
        yield cluster.primary


@pytest.fixture(scope="module")
def bouncer(server: PostgresServer) -> Iterator[PgBouncer]:
    with pgbouncer(server.url(), server_login_retry="0.2") as made:
        yield made


@pytest.fixture(params=OPTIONS)
def driver(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def bank(
    driver: str, server: PostgresServer, bouncer: PgBouncer, make_session: MakeRegistry
) -> Iterator[Bank]:
    options = {"pool_size": CLIENTS, **OPTIONS[driver]}
    bank = Bank(make_session(bouncer.url(driver=driver), **options), attempts=20)
    bank.open(server.fetch)
    yield bank
    gc.collect()  # and so the sockets go in this module's tests


def kill_backends(server: PostgresServer) -> None:
    server.fetch(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
    )


# pg8000 leaves a socket open where it is not let in.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("victim", ["backends", "bouncer", "server"])
def test_no_kill_loses_or_repeats_a_transfer(
    victim: str, bank: Bank, server: PostgresServer, bouncer: PgBouncer
) -> None:
    """What was acknowledged is in the books, once; what failed is not; the sum is kept.

    The clients see no other errors than those of which the outcome is unknown.
    """
    with Load([bank], CLIENTS) as load:
        load.run_until(50)
        for _ in range(KILLS if victim != "server" else 2):
            if victim == "backends":
                kill_backends(server)
            elif victim == "bouncer":
                bouncer.kill()
                bouncer.start()
            else:
                server.kill()
                server.start()
            load.run_until(30)

    audit(bank, load, server.fetch)
    assert load.count(ACKNOWLEDGED) >= 50
    assert load.count(ROLLED_BACK) == 0, load.errors


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"], indirect=True)
def test_serializable_transfers_that_read_first_lose_nothing(
    driver: str, server: PostgresServer, bouncer: PgBouncer, make_session: MakeRegistry
) -> None:
    """Read-modify-write behind the bouncer, with the retry."""
    registry = make_session(
        bouncer.url(driver=driver), isolation_level="SERIALIZABLE", **OPTIONS[driver]
    )
    bank = Bank(registry, accounts=4, reads_first=True, attempts=50)
    bank.open(server.fetch)

    with Load([bank], CLIENTS) as load:
        load.run_until(100)

    audit(bank, load, server.fetch)
    assert load.count(ROLLED_BACK) == 0, load.errors
