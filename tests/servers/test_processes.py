"""Forked and killed processes: no connection is shared, and nothing is saved by halves."""

from __future__ import annotations

import json
import os
import signal
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from .client import Connection
from .fleet import SERVERS, Running

if TYPE_CHECKING:
    from .conftest import Observer
    from .facts import Facts

pytestmark = pytest.mark.promise("servers")

#: seconds within which a killed worker's successor answers
RESPAWN_BOUND = 20.0


def identity(running: Running, sleep: float = 0.005) -> dict[str, Any]:
    """Ask a request which process and which backend served it."""
    seen = running.fetch(f"/default/identity?token={uuid.uuid4().hex}&sleep={sleep}")
    assert seen.kind == "200", running.log()
    told: dict[str, Any] = json.loads(seen.body)
    assert told["same"]
    return told


@pytest.mark.promise("forks")
def test_forked_processes_share_no_connection(
    running: Running, observer: Observer, facts: Facts
) -> None:
    """An application used its database before the fork: no worker speaks on that connection."""
    server = running.server
    owners: dict[int, int] = {}
    pids: set[int] = set()
    deadline = time.monotonic() + 10
    with ThreadPoolExecutor(6) as pool:
        while time.monotonic() < deadline:
            for told in pool.map(lambda _: identity(running, 0.05), range(6)):
                parent, inherited = told["import"]
                assert (told["pid"] != parent) == server.preloaded
                if server.preloaded:
                    assert told["backend"] != inherited, (
                        "a worker spoke on its parent's connection"
                    )
                assert owners.setdefault(told["backend"], told["pid"]) == told["pid"]
                pids.add(told["pid"])
            if len(pids) == server.processes:
                break
    assert len(pids) == server.processes
    facts.see(
        "fork",
        "application imported before the fork: no connection shared"
        if server.preloaded
        else "application imported in the worker",
    )


def _hang(running: Running, observer: Observer, token: str) -> tuple[Connection, int]:
    """Bring a request to where its work is done, but not committed; tell which process has it."""
    connection = Connection(running.port)
    connection.send(f"/default/hang?token={token}")
    deadline = time.monotonic() + 10
    while True:
        for _, name in observer.busy(running):
            if " " in name:
                return connection, int(name.split()[1])
        assert time.monotonic() < deadline, running.log()
        time.sleep(0.02)


def _serves_again(running: Running, observer: Observer) -> float:
    """Wait until a request is served and saved; return the seconds that it took."""
    begin = time.monotonic()
    while True:
        token = uuid.uuid4().hex
        try:
            if running.fetch(f"/default/identity?token={token}", timeout=2).kind == "200":
                assert observer.saved(token)
                return time.monotonic() - begin
        except OSError:
            pass
        assert time.monotonic() - begin < RESPAWN_BOUND, running.log()
        time.sleep(0.05)


def test_a_worker_killed_in_mid_request_saves_nothing(
    running: Running, observer: Observer, facts: Facts, database_url: str, token: str
) -> None:
    """SIGKILL in mid-request: nothing is half-committed, and the next request is served."""
    connection, pid = _hang(running, observer, token)
    with connection:
        os.kill(pid, signal.SIGKILL)
        observer.wait_idle(running)
        assert not observer.saved(token)
        assert not connection.receive().success
    if running.server.supervised:
        facts.see("killed", "rolled back, a new worker serves")
        facts.measure("killed seconds", _serves_again(running, observer))
    else:
        facts.see("killed", "rolled back, to be started again")
        again = Running(running.server, database_url)
        try:
            _serves_again(again, observer)
        finally:
            again.stop()


@pytest.mark.parametrize(
    ("name", "option"), [("gunicorn sync", "--timeout=2"), ("uWSGI", "--harakiri=1")]
)
def test_a_worker_timed_out_in_mid_request_saves_nothing(
    name: str, option: str, observer: Observer, database_url: str, token: str
) -> None:
    """The master ends a worker that takes too long: rolled back, the next request is served."""
    server = next(server for server in SERVERS if server.name == name)
    if reason := server.missing():
        pytest.skip(f"NOT RUN: {name}: {reason}")
    running = Running(server, database_url, option)
    try:
        connection, _ = _hang(running, observer, token)
        with connection:
            assert not connection.receive().success
        observer.wait_idle(running)
        assert not observer.saved(token)
        _serves_again(running, observer)
    finally:
        running.stop()
