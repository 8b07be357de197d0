"""A segment: one server, its clients, its faults, and the checks at its end."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.servers.client import fetch
from tests.servers.fleet import SERVERS, Running
from tests.soak.checks import audit
from tests.soak.clients import Clients, Plan, Shape
from tests.soak.databases import clear, read
from tests.soak.history import Journal, Violation
from tests.soak.nemesis import Nemesis
from tests.support.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.servers.fleet import Server
    from tests.soak.databases import Database

SERVED = Path(__file__).parent / "served"
BY_NAME = {server.name: server for server in SERVERS}
# One sync worker would answer one request at a time.
EXTRA = {"gunicorn sync": ("--workers", "4")}
# gunicorn writes a traceback for each error of the application otherwise.
QUIET = ("--log-level", "critical", "--no-control-socket")


class Served:
    """A server with the bank, which is started again when it was killed."""

    def __init__(self, server: Server, url: str, environ: dict[str, str]) -> None:
        self.server = server
        self._url = url
        self._environ = environ
        self._lock = threading.Lock()
        self.deaths: list[float] = []
        self._extra: tuple[str, ...] = EXTRA.get(server.name, ())
        if server.name.startswith("gunicorn"):
            self._extra += QUIET
        self.running = self._start()

    def _start(self) -> Running:
        return Running(
            self.server, self._url, *self._extra, place=SERVED, environ=self._environ, life=3600
        )

    def port(self) -> int:
        """Return where it listens."""
        return self.running.port

    def kill(self, pid: int) -> None:
        """Kill a worker; start the server again where nothing else does."""
        self.deaths.append(time.monotonic())
        os.kill(pid, signal.SIGKILL)
        if not self.server.supervised:
            self.running.stop()
            self.running = self._start()

    def stop(self) -> None:
        """End it."""
        self.running.stop()


@dataclass
class Setup:
    """What a segment is made of."""

    name: str
    server: str
    seed: str
    shapes: Sequence[Shape]
    seconds: float
    most: int
    faults: Sequence[str] = ()
    control: str = ""
    isolation: str = ""
    clients: int = 12


@dataclass
class Result:
    """What came out of it."""

    name: str
    server: str
    configuration: str
    seconds: float = 0.0
    told: dict[str, dict[str, int]] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    felt: dict[str, int] = field(default_factory=dict)
    reads: int = 0
    memory: list[int] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)


def run(setup: Setup, database: Database) -> Result:
    """Run a segment."""
    clear(database)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="wsgi_dbsession-") as place:
        path = Path(place) / "journal"
        with Proxy.to(database.url("bank")) as proxy:
            urls = [
                proxy.url(database.url(name)).render_as_string(hide_password=False)
                for name in ("bank", "branch")
            ]
            environ = {
                "SOAK_BRANCH_URL": urls[1],
                "SOAK_CONTROL": setup.control,
                "SOAK_ISOLATION": setup.isolation,
                "SOAK_JOURNAL": str(path),
            }
            served = Served(BY_NAME[setup.server], urls[0], environ)
            try:
                clients, nemesis = _send(setup, served, proxy, database)
                left = _wait_for_rest(served, database)
            finally:
                served.stop()
        journal = Journal(path)
    result = Result(setup.name, setup.server, setup.isolation or "default isolation")
    result.violations = [
        *clients.violations,
        *audit(clients.transfers, journal, read(database), served.deaths),
        *left,
    ]
    result.seconds = time.monotonic() - begun
    result.reads = clients.reads
    for transfer in clients.transfers:
        counts = result.told.setdefault(transfer.shape, {})
        counts[transfer.told] = counts.get(transfer.told, 0) + 1
    result.faults = dict(nemesis.counts)
    return result


def _send(
    setup: Setup, served: Served, proxy: Proxy, database: Database
) -> tuple[Clients, Nemesis]:
    plan = Plan(
        setup.name,
        setup.seed,
        served.port,
        setup.shapes,
        setup.clients,
        setup.most,
        hang_ups=0.01 if "hang up" in setup.faults else 0,
    )
    clients = Clients(plan)
    nemesis = Nemesis(setup.faults, setup.seed, served, proxy, database)
    clients.start()
    nemesis.start()
    clients.wait(setup.seconds)
    nemesis.stop()
    clients.stop()
    return clients, nemesis


def _wait_for_rest(served: Served, database: Database, seconds: float = 20) -> list[Violation]:
    """Wait until no process has anything left, and return what is left all the same."""
    deadline = time.monotonic() + seconds
    while True:
        left: Counter[str] = Counter()
        seen: set[int] = set()
        wanted = set(served.running.workers())
        for _ in range(20 * len(wanted)):
            state: dict[str, Any] = json.loads(fetch(served.port(), "/state?all").body)
            if state["pid"] not in seen:
                seen.add(state["pid"])
                left.update(state["left"])
            if wanted <= seen:
                break
        busy = database.busy()
        if not left and not busy:
            return []
        if time.monotonic() > deadline:
            found = [f"{name}: {count}" for name, count in left.items()] + busy
            return [Violation("left over", served.server.name, found)]
        time.sleep(0.2)
