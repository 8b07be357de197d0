"""The server of a segment, which is started again when a fault has killed it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.servers.client import fetch
from tests.servers.fleet import SERVERS, Running

if TYPE_CHECKING:
    from tests.servers.fleet import Server

SERVED = Path(__file__).parent / "served"
BY_NAME = {server.name: server for server in SERVERS}
# One sync worker would answer one request at a time.
WORKERS = {"gunicorn sync": 4, "gunicorn gthread": 2, "gunicorn gevent": 2}
# gunicorn writes a traceback for each error of the application otherwise.
QUIET = ("--log-level", "critical", "--no-control-socket")
LIFE = 3600.0  # seconds after which a server is ended, whatever happens


class Served:
    """A server with the bank, which is started again when it was killed."""

    def __init__(self, server: Server, workers: int, url: str, environ: dict[str, str]) -> None:
        self.server = server
        self.deaths: list[float] = []
        #: how many objects each process had when it was asked last
        self.objects: dict[int, int] = {}
        self._url = url
        self._environ = environ
        self._extra: tuple[str, ...] = ()
        if server.name.startswith("gunicorn"):
            self._extra = ("--workers", str(workers), *QUIET)
        self.running = self._start()

    def _start(self) -> Running:
        return Running(
            self.server, self._url, *self._extra, place=SERVED, environ=self._environ, life=LIFE
        )

    def port(self) -> int:
        """Return where it listens."""
        return self.running.port

    def kill(self, pid: int) -> None:
        """Kill a worker; start the server again where nothing else does."""
        self.deaths.append(time.monotonic())
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        if not self.server.supervised:
            self.running.stop()
            self.running = self._start()

    def states(self) -> list[dict[str, Any]]:
        """Ask each worker what it has left; those that were not reached are missing."""
        found: dict[int, dict[str, Any]] = {}
        wanted = set(self.running.workers())
        for _ in range(30 * len(wanted)):
            with contextlib.suppress(OSError):
                seen = fetch(self.port(), "/state?all")
                if seen.success:
                    state = json.loads(seen.body)
                    found[state["pid"]] = state
            if wanted <= set(found):
                break
        return list(found.values())

    def stop(self) -> None:
        """End it."""
        self.running.stop()
