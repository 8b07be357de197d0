"""What was seen, and where it is written down: `results.json`, from which the page is made.

A test says what it saw with `Facts.see`. In an ordinary run that compares it with `results.json`,
so that docs/servers.md cannot go stale unnoticed; where `WSGI_DBSESSION_RECORD` names a folder, it
is written down there, for :mod:`tests.servers.report` to collect.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .fleet import Server

RESULTS = Path(__file__).parent / "results.json"

#: server: what: how it was seen
Results = dict[str, dict[str, str]]


def load() -> Results:
    """Return what is written down."""
    if not RESULTS.exists():
        return {}
    loaded: Results = json.loads(RESULTS.read_text())
    return loaded


def record(server: str, what: str, value: str) -> None:
    """Write down what was seen, if this is the run for it."""
    if folder := os.environ.get("WSGI_DBSESSION_RECORD"):
        with (Path(folder) / f"{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps([server, what, value]) + "\n")


def versions(server: Server) -> str:
    """Name the versions of what runs."""
    names = [*server.needs, "SQLAlchemy", "psycopg"]
    python = "Python {}.{}".format(*sys.version_info)
    return ", ".join([*(f"{name} {version(name)}" for name in names), python])


class Facts:
    """What was seen of one server."""

    def __init__(self, server: Server) -> None:
        self._server = server.name
        self._versions = versions(server)
        self._known = load().get(server.name, {})
        record(server.name, "versions", self._versions)

    def see(self, what: str, value: str) -> None:
        """Write down what was seen; fail where the page says otherwise of these very versions."""
        record(self._server, what, value)
        if os.environ.get("WSGI_DBSESSION_RECORD"):
            return
        if self._known.get("versions") == self._versions and self._known.get(what) != value:
            pytest.fail(
                f"docs/servers.md says of {self._server} ({self._versions}), {what}: "
                f"{self._known.get(what)!r}, but seen was {value!r}. Is that right? Then: "
                "make docs-servers"
            )

    def measure(self, what: str, value: float) -> None:
        """Write down a number that another run will not meet exactly."""
        record(self._server, what, f"{value:.2f}")
