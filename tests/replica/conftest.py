"""A PostgreSQL primary with two standbys, a MariaDB, and engines for both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.replica.site import Site
from tests.replica.tables import empty_tables
from tests.support.clusters import postgres_cluster
from tests.support.galera import mariadb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import URL, Engine

    from tests.support.clusters import PostgresCluster

DRIVERS = ["psycopg", "psycopg2", "pg8000"]


def checked_out(engine: Engine) -> int:
    """Return how many of an engine's connections are in use."""
    pool: Any = engine.pool
    count: int = pool.checkedout()
    return count


@pytest.fixture(scope="session")
def cluster() -> Iterator[PostgresCluster]:
    """A primary and two standbys, for tests that leave them as they were."""
    with postgres_cluster(2) as made:
        empty_tables(made.primary.url())
        made.wait_caught_up()
        yield made


@pytest.fixture(scope="session")
def mariadb_url() -> Iterator[URL]:
    """A MariaDB with the tables."""
    with mariadb() as server:
        empty_tables(server.url())
        yield server.url()


@pytest.fixture
def keep() -> Iterator[Callable[[Engine], Engine]]:
    """Takes engines, and at the end looks for what was not given back."""
    kept: list[Engine] = []

    def keep(engine: Engine) -> Engine:
        kept.append(engine)
        return engine

    yield keep
    counts = [checked_out(engine) for engine in kept]
    for engine in kept:
        engine.dispose()
    assert not any(counts), f"connections were not returned to the pools: {counts}"


@pytest.fixture
def site(cluster: PostgresCluster, keep: Callable[[Engine], Engine]) -> Site:
    """An application, its primary, and two replicas by :func:`read_only_engine`."""
    return Site(cluster, keep)
