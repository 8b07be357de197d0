"""Reading from a standby of PostgreSQL at AUTOCOMMIT writes nothing, so it may be run again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from tests.retry.applications import flask_app, list_app, protect
from tests.support.clusters import postgres_cluster
from tests.support.models import make_engine
from tests.support.processes import wait_until
from tests.support.wsgi import drive, make_registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from sqlalchemy import Engine

    from tests.support.clusters import PostgresCluster, PostgresServer

pytestmark = [pytest.mark.clusters, pytest.mark.promise("run again")]


@pytest.fixture(scope="module")
def cluster() -> Iterator[PostgresCluster]:
    """A primary and its standbys, for all tests."""
    with postgres_cluster(standbys=1) as made:
        made.primary.fetch("CREATE TABLE note (id SERIAL PRIMARY KEY, text TEXT)")
        made.wait_caught_up()
        yield made


@pytest.fixture
def autocommit(cluster: PostgresCluster, driver: str) -> Iterator[Engine]:
    """An engine for reads, on the standby."""
    url = cluster.standbys[0].url(driver=driver)
    engine = make_engine(url, isolation_level="AUTOCOMMIT")
    yield engine
    engine.dispose()


def end_connections(server: PostgresServer) -> None:
    """End all client connections but the one that does it: their clients get 57P01."""
    server.fetch(
        "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
        " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
    )


@pytest.mark.parametrize("shape", [list_app, flask_app], ids=["raised", "error page"])
@pytest.mark.parametrize("read_before", [True, False], ids=["second read", "first read"])
def test_a_read_that_a_standby_ended_is_not_noticed(
    read_before: bool, shape: Any, autocommit: Engine, cluster: PostgresCluster
) -> None:
    """57P01 in mid-request, or a pooled connection that is dead."""
    registry = make_registry(autocommit)
    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        if read_before:
            registry.execute(text("SELECT * FROM note"))
        if len(attempts) == 1:
            end_connections(cluster.standbys[0])
        registry.execute(text("SELECT * FROM note"))

    with autocommit.connect() as connection:
        connection.execute(text("SELECT 1"))

    assert drive(protect(shape(work), registry), "POST").body == b"done"
    assert len(attempts) == 2


def test_a_write_after_the_standby_was_promoted_is_never_run_again(
    driver: str, cluster: PostgresCluster
) -> None:
    """The connection was read-only when the request began to read."""
    standby = cluster.add_standby()
    engine = make_engine(standby.url(driver=driver), isolation_level="AUTOCOMMIT")
    registry = make_registry(engine)
    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        registry.execute(text("SELECT * FROM note"))
        standby.promote()
        wait_until(_writes(registry.execute), "the write is accepted")
        end_connections(standby)
        registry.execute(text("SELECT * FROM note"))

    with pytest.raises(DBAPIError):
        drive(protect(list_app(work), registry))

    assert len(attempts) == 1
    assert standby.value("SELECT count(*) FROM note WHERE text = 'kept'") == 1
    engine.dispose()
    standby.stop()


def _writes(execute: Callable[..., object]) -> Callable[[], bool]:
    def write() -> bool:
        execute(text("INSERT INTO note (text) VALUES ('kept')"))
        return True

    return write
