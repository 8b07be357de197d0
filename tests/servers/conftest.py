"""Fixtures: the database as an observer sees it, and the servers, each started once per module."""

from __future__ import annotations

import json
import os
import time
import uuid
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Engine, create_engine, text

from .facts import Facts
from .fleet import SERVERS, Running, Server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support import postgres

SCHEMA = """
CREATE TABLE note (token text PRIMARY KEY);
CREATE TABLE child (
    token text PRIMARY KEY,
    parent text NOT NULL REFERENCES note DEFERRABLE INITIALLY DEFERRED
);
"""


class Observer:
    """Asks PostgreSQL what was saved, and what the connections of a server are doing."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def _ask(self, sql: str, **parameters: object) -> list[Any]:
        with self._engine.connect() as connection:
            return list(connection.execute(text(sql), parameters))

    def saved(self, token: str) -> bool:
        """Return whether the row of a request was committed."""
        return bool(self._ask("SELECT 1 FROM note WHERE token = :t", t=token))

    def busy(self, running: Running) -> list[tuple[int, str]]:
        """Return the backends of a server that are in a transaction, with their names."""
        return [
            (pid, name)
            for pid, name in self._ask(
                "SELECT pid, application_name FROM pg_stat_activity "
                "WHERE application_name LIKE :n AND state <> 'idle'",
                n=running.name + "%",
            )
        ]

    def wait_busy(self, running: Running, count: int, seconds: float = 10) -> None:
        """Wait until at least *count* transactions are open."""
        deadline = time.monotonic() + seconds
        while len(self.busy(running)) < count:
            assert time.monotonic() < deadline, f"no {count} transactions\n{running.log()}"
            time.sleep(0.02)

    def wait_idle(self, running: Running, seconds: float = 10) -> float:
        """Wait until the server has no transaction open; return the seconds that it took."""
        begin = time.monotonic()
        while busy := self.busy(running):
            waited = time.monotonic() - begin
            assert waited < seconds, f"{busy} not idle after {seconds} s\n{running.log()}"
            time.sleep(0.02)
        return time.monotonic() - begin


@pytest.fixture(scope="session")
def database_url(postgres_server: postgres.Server) -> str:
    """A database for the servers that this test process starts."""
    url = postgres_server.create_database(
        f"servers_{os.environ.get('PYTEST_XDIST_WORKER', 'main')}"
    )
    return url.render_as_string(hide_password=False)


@pytest.fixture(scope="session")
def observer(database_url: str) -> Iterator[Observer]:
    engine = create_engine(database_url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for statement in SCHEMA.split(";")[:-1]:
            connection.execute(text(statement))
    yield Observer(engine)
    engine.dispose()


# Those that cannot run here are reported once, in test_fleet.py.
@pytest.fixture(
    scope="module",
    params=[
        # One test worker runs all that is about a server, so that it starts once per module.
        pytest.param(server, marks=pytest.mark.xdist_group(server.name), id=server.name)
        for server in SERVERS
        if server.missing() is None
    ],
)
def server(request: pytest.FixtureRequest) -> Server:
    """One server set-up after the other."""
    found: Server = request.param
    return found


@pytest.fixture(scope="module")
def running(server: Server, observer: Observer, database_url: str) -> Iterator[Running]:
    """Run the server for the tests of one module."""
    started = Running(server, database_url)
    yield started
    started.stop()


@pytest.fixture(scope="module")
def facts(server: Server) -> Facts:
    return Facts(server)


@pytest.fixture
def token() -> str:
    return uuid.uuid4().hex


@pytest.fixture
def clean(running: Running, observer: Observer) -> Iterator[None]:
    """After the test: no transaction, no session, no connection, no scope is left over."""
    yield
    observer.wait_idle(running)
    deadline = time.monotonic() + 10
    while True:
        state = json.loads(running.fetch("/state").body)
        left = {name: state[name] for name in ("scope", "sessions", "connections") if state[name]}
        if not left:
            break
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
