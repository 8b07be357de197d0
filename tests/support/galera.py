"""MariaDB servers: one alone, or the nodes of a Galera cluster.

:func:`mariadb` and :func:`galera` are context managers; everything listens on 127.0.0.1 and is
gone when they end.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pymysql
from sqlalchemy import URL

from tests.support.processes import (
    Process,
    directory,
    free_port,
    missing,
    require,
    run,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.support.processes import Argument

PROVIDERS = ("/usr/lib/galera/libgalera_smm.so", "/usr/lib64/galera/libgalera_smm.so")
OPTIONS = [
    "--bind-address=127.0.0.1",
    "--binlog-format=ROW",
    "--innodb-autoinc-lock-mode=2",
    "--innodb-flush-log-at-trx-commit=0",
    "--innodb-buffer-pool-size=32M",
    "--innodb-log-file-size=16M",
    "--skip-name-resolve",
]
# A node that does not answer is expelled after about two seconds, not after the default's five.
TIMES = {
    "evs.inactive_check_period": "PT0.3S",
    "evs.inactive_timeout": "PT3S",
    "evs.install_timeout": "PT3S",
    "evs.keepalive_period": "PT0.3S",
    "evs.suspect_timeout": "PT1.5S",
    # For wsrep_sync_wait: where the others leave meanwhile, the answer never comes.
    "repl.causal_read_timeout": "PT5S",
}


class MariaDBServer:
    """One server; a node, where it is one of a cluster."""

    def __init__(
        self, place: Path, name: str, options: Sequence[str], *, replicates: bool = False
    ) -> None:
        self.name = name
        self.host = "127.0.0.1"
        self.port = free_port()
        self.data = place / name
        # For the other nodes, for incremental and for whole copies of the data.
        self.group, self.incremental, self.snapshot = (free_port() for _ in range(3))
        self._replicates = replicates
        program = require("mariadbd", "mariadb-server")
        temporary = _temporary(place, name)
        command: list[Argument] = [
            *(program, "--no-defaults", f"--datadir={self.data}", f"--port={self.port}"),
            f"--tmpdir={temporary}",
            *(f"--socket={place / name}.sock", f"--pid-file={place / name}.pid"),
            *OPTIONS,
            *(self._replication() if replicates else []),
            *options,
        ]
        self.process = Process(command, place, name)

    def _replication(self) -> list[str]:
        provider = {
            "gmcast.listen_addr": f"tcp://127.0.0.1:{self.group}",
            "ist.recv_addr": f"127.0.0.1:{self.incremental}",
            "gcache.size": "32M",
            "pc.recovery": "no",
            **TIMES,
        }
        return [
            "--wsrep-on=ON",
            f"--wsrep-provider={_provider()}",
            f"--wsrep-node-name={self.name}",
            f"--wsrep-node-address=127.0.0.1:{self.group}",
            "--wsrep-sst-method=rsync",
            f"--wsrep-sst-receive-address=127.0.0.1:{self.snapshot}",
            "--wsrep-provider-options="
            + ";".join(f"{name}={value}" for name, value in provider.items()),
        ]

    def url(self, database: str = "test", *, driver: str = "pymysql") -> URL:
        """Return the SQLAlchemy URL of one of the server's databases."""
        return URL.create(
            f"mysql+{driver}", username="root", host=self.host, port=self.port, database=database
        )

    def connect(self, database: str | None = None) -> pymysql.Connection[Any]:
        """Return a plain connection in autocommit mode, for looking on from outside."""
        return pymysql.connect(
            host=self.host,
            port=self.port,
            user="root",
            database=database,
            autocommit=True,
            connect_timeout=5,
            read_timeout=30,
        )

    def fetch(self, query: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Run one statement on a connection of its own, and return its rows."""
        with contextlib.closing(self.connect()) as connection, connection.cursor() as cursor:
            cursor.execute(query, parameters)
            return list(cursor.fetchall())

    def value(self, query: str, *parameters: object) -> Any:
        """Run one statement and return the only value of its only row."""
        ((value,),) = self.fetch(query, *parameters)
        return value

    def status(self, name: str) -> str:
        """Return one of ``SHOW GLOBAL STATUS``, or ``""`` where it is not there."""
        rows = self.fetch("SHOW GLOBAL STATUS LIKE %s", name)
        return str(rows[0][1]) if rows else ""

    # -- life -------------------------------------------------------------------------------------

    def start(self, *members: MariaDBServer, ready: bool = True) -> None:
        """Start the server; wait until it answers, unless told not to.

        :param members: The nodes of the cluster that it joins; without them it begins one.
        """
        extra: list[str] = []
        if self._replicates:
            addresses = ",".join(f"127.0.0.1:{each.group}" for each in members)
            extra = [f"--wsrep-cluster-address=gcomm://{addresses}"]
        self.process.start(*extra)
        if ready:
            self.process.wait_ready(self.is_ready)

    def is_ready(self) -> bool:
        """Return whether the server answers; a node must also be a part of the cluster."""
        if self._replicates:
            synced = self.status("wsrep_local_state_comment") == "Synced"
            return synced and self.status("wsrep_ready") == "ON"
        return bool(self.value("SELECT 1"))

    def kill(self) -> None:
        """Kill the server with SIGKILL: a crash."""
        self.process.kill()

    def stop(self) -> None:
        """Stop the server in good order; a node leaves the cluster."""
        self.process.stop()

    def freeze(self) -> None:
        """Stop the server where it is (SIGSTOP): its connections stay, and nothing answers."""
        self.process.freeze()

    def thaw(self) -> None:
        """Let a frozen server go on (SIGCONT)."""
        self.process.thaw()


class Galera:
    """A Galera cluster; all nodes accept writes."""

    def __init__(self, nodes: list[MariaDBServer]) -> None:
        self.nodes = nodes

    def alive(self) -> list[MariaDBServer]:
        """Return the nodes whose process exists, a frozen one included."""
        return [node for node in self.nodes if node.process.is_running()]

    def wait_size(self, size: int, node: MariaDBServer | None = None) -> None:
        """Wait until a node, or each that runs, belongs to a cluster of so many."""
        for each in [node] if node else self.alive():
            wait_until(
                functools.partial(self._has_size, each, size), f"{each.name} counts {size} nodes"
            )

    def _has_size(self, node: MariaDBServer, size: int) -> bool:
        return node.is_ready() and node.status("wsrep_cluster_size") == str(size)

    def join(self, node: MariaDBServer) -> None:
        """Start a node that was killed or stopped, and wait until it has caught up."""
        node.start(*(each for each in self.alive() if each is not node))


@contextlib.contextmanager
def mariadb(*options: str) -> Iterator[MariaDBServer]:
    """Start one MariaDB server with an empty database ``test``, about two seconds.

    :param options: More options of the program ``mariadbd``.
    """
    with directory("mariadb") as place:
        server = MariaDBServer(place, "mariadb", options)
        try:
            _install(place, server.data)
            server.start()
            server.fetch("CREATE DATABASE test")
            yield server
        finally:
            server.kill()


@contextlib.contextmanager
def galera(nodes: int = 3, *options: str) -> Iterator[Galera]:
    """Start a Galera cluster with an empty database ``test``, about ten seconds for three nodes.

    :param options: More options of the program ``mariadbd``.
    """
    _provider()
    require("rsync", "rsync")
    with directory("galera") as place, contextlib.ExitStack() as stack:
        cluster = Galera([])
        _install(place, place / "pristine")
        for number in range(1, nodes + 1):
            node = MariaDBServer(place, f"node{number}", options, replicates=True)
            stack.callback(node.kill)
            shutil.copytree(place / "pristine", node.data)
            _give_away(node.data, place)
            cluster.nodes.append(node)
            cluster.join(node)
        cluster.wait_size(nodes)
        cluster.nodes[0].fetch("CREATE DATABASE test")
        yield cluster


def _install(place: Path, data: Path) -> None:
    run(
        [
            *(require("mariadb-install-db", "mariadb-server"), "--no-defaults"),
            *(f"--datadir={data}", "--auth-root-authentication-method=normal", "--skip-test-db"),
            *("--innodb-log-file-size=16M", f"--tmpdir={_temporary(place, 'install')}"),
        ],
        place,
    )


def _temporary(place: Path, name: str) -> Path:
    """Make a folder for temporary tables: a server that starts deletes those that it finds."""
    folder = place / f"{name}.tmp"
    folder.mkdir(exist_ok=True)
    _give_away(folder, place)
    return folder


def _give_away(data: Path, place: Path) -> None:
    # Copied as the tests' user; to belong to the servers'.
    owner = place.stat()
    for path in [data, *data.rglob("*")]:
        os.chown(path, owner.st_uid, owner.st_gid)


def _provider() -> str:
    for path in PROVIDERS:
        if Path(path).exists():
            return path
    missing("Galera", "galera-4 mariadb-server rsync")
    return None
