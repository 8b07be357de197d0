"""What a restart of PostgreSQL does to requests."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from tests.retry.applications import flask_app, list_app, protect
from tests.retry.databases import add_note, assert_unknown, do_at_commit, engine_of, wait_until
from tests.support import postgres
from tests.support.models import Note
from tests.support.wsgi import drive, make_registry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Engine

pytestmark = [pytest.mark.clusters, pytest.mark.promise("never again")]


class Cluster:
    """A PostgreSQL server of the test's own, that it can stop and start."""

    def __init__(self, run: postgres.Run) -> None:
        self.server = postgres.server(run.directory)
        self._data = run.directory / "data"
        # The keeper's copy where there is one: the original may be out of the server's reach.
        link = Path(f"/proc/{self._pid()}/exe")
        self._pg_ctl = str(link.resolve().with_name("pg_ctl"))

    def _pid(self) -> int:
        return int((self._data / "postmaster.pid").read_text().split()[0])

    def _control(self, *arguments: str) -> None:
        owner = self._data.stat().st_uid
        subprocess.run(
            [self._pg_ctl, "-D", str(self._data), "-s", "-w", "-t", "30", *arguments],
            check=True,
            cwd="/",
            user=owner if os.geteuid() == 0 else None,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
        )

    def restart(self) -> None:
        self._control("restart", "-m", "fast", "-l", str(self._data / "restart.log"))

    def stop(self) -> None:
        self._control("stop", "-m", "immediate")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A server that may be restarted without harm to other tests."""
    run = postgres.Run()
    try:
        made = Cluster(run)
        yield made
        made.stop()
    finally:
        run.end()


@pytest.fixture
def restarting(cluster: Cluster, driver: str) -> Iterator[Engine]:
    """An engine of the server that is restarted."""
    name = cluster.server.create_database("restart").database
    assert name is not None
    with engine_of(cluster.server.url(name), driver) as engine:
        Note.metadata.create_all(engine)
        yield engine


@pytest.mark.parametrize("at", ["between requests", "in mid-transaction"])
def test_a_restart_of_postgresql_before_the_commit_is_not_noticed(
    at: str, restarting: Engine, cluster: Cluster
) -> None:
    """When the server answers again, the request is run again on a new connection."""
    registry = make_registry(restarting)
    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        add_note(registry)
        if at == "in mid-transaction" and len(attempts) == 1:
            cluster.restart()
        registry.execute(text("SELECT 1"))

    if at == "between requests":
        cluster.restart()

    assert drive(protect(flask_app(work), registry), "POST").body == b"done"
    assert len(attempts) == 2
    with restarting.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM note")) == 1


def test_a_restart_of_postgresql_during_commit_is_never_run_again(
    restarting: Engine, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """The outcome is unknown then, and the log and the error say so."""
    registry = make_registry(restarting)
    attempts: list[None] = []
    errors: list[BaseException] = []

    def work() -> None:
        attempts.append(None)
        registry.execute(text("INSERT INTO author (name) VALUES ('somebody')"))

    def request() -> None:
        try:
            drive(protect(list_app(work), registry), "POST")
        except DBAPIError as error:
            errors.append(error)

    with restarting.begin() as connection:
        # Not for a lock: its holder may be ended first.
        do_at_commit(connection, "PERFORM pg_sleep(60)")
    thread = threading.Thread(target=request)
    thread.start()
    with cluster.server.connect() as observer:
        sleeping = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
        wait_until(lambda: observer.execute(sleeping).fetchall())
    cluster.restart()
    thread.join(60)

    assert len(attempts) == 1
    (error,) = errors
    assert_unknown(caplog, error)
