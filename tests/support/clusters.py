"""A PostgreSQL primary with standbys, and PgBouncer, for one test or one module of tests.

:func:`postgres_cluster` and :func:`pgbouncer` are context managers; everything listens on
127.0.0.1 and is gone when they end. The MariaDB servers are in :mod:`tests.support.galera`.
"""

from __future__ import annotations

import contextlib
import functools
import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psycopg
from sqlalchemy import URL

from tests.support import postgres, postgres_keeper
from tests.support.processes import (
    Process,
    directory,
    free_port,
    identity,
    require,
    run,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

PRIMARY_SETTINGS = {
    "autovacuum": "off",
    "deadlock_timeout": "100ms",
    "fsync": "off",
    "hot_standby": "on",
    "listen_addresses": "127.0.0.1",
    "max_connections": "200",
    "max_prepared_transactions": "20",
    "max_wal_senders": "10",
    "shared_buffers": "32MB",
    "wal_keep_size": "256MB",
    "wal_level": "replica",
}
STANDBY_SETTINGS = {
    "hot_standby_feedback": "on",
    "recovery_target_timeline": "latest",
    "wal_retrieve_retry_interval": "100ms",
}


class PostgresServer:
    """One server: the primary or a standby."""

    def __init__(self, bin_: Path, place: Path, name: str, settings: Mapping[str, str]) -> None:
        self.name = name
        self.host = "127.0.0.1"
        self.port = free_port()
        self.data = place / name
        self.settings = dict(settings)
        self._bin = bin_
        self._place = place
        self.process = Process([bin_ / "postgres", "-D", self.data], place, name)

    def url(self, database: str = "postgres", *, driver: str = "psycopg") -> URL:
        """Return the SQLAlchemy URL of one of the server's databases."""
        return URL.create(
            f"postgresql+{driver}",
            username="postgres",
            host=self.host,
            port=self.port,
            database=database,
        )

    def connect(self, database: str = "postgres") -> psycopg.Connection[tuple[Any, ...]]:
        """Return a plain connection in autocommit mode, for looking on from outside."""
        return psycopg.connect(
            host=self.host,
            port=self.port,
            user="postgres",
            dbname=database,
            autocommit=True,
            application_name="tests",
            connect_timeout=5,
        )

    def fetch(self, query: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Run one statement on a connection of its own, and return its rows."""
        with self.connect() as connection:
            cursor = connection.execute(query.encode(), parameters or None)
            return cursor.fetchall() if cursor.description else []

    def value(self, query: str, *parameters: object) -> Any:
        """Run one statement and return the only value of its only row."""
        ((value,),) = self.fetch(query, *parameters)
        return value

    # -- life -------------------------------------------------------------------------------------

    def start(self, *, ready: bool = True) -> None:
        """Start the server; wait until it answers, unless told not to."""
        arguments: list[str] = []
        settings = {**self.settings, "port": str(self.port)}
        for name, value in {**settings, "unix_socket_directories": str(self._place)}.items():
            arguments += ["-c", f"{name}={value}"]
        self.process.start(*arguments)
        if ready:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Wait until the server answers a query."""
        self.process.wait_ready(lambda: self.value("SELECT 1"))

    def kill(self) -> None:
        """Kill the server with SIGKILL, backends included: a crash."""
        self.process.kill()

    def stop(self, mode: str = "fast") -> None:
        """Stop the server: ``"fast"`` (rolls back and says goodbye) or ``"immediate"``."""
        self.process.stop(signal.SIGINT if mode == "fast" else signal.SIGQUIT)

    def restart(self, mode: str = "fast") -> None:
        """Stop the server, and start it again."""
        self.stop(mode)
        self.start()

    def is_in_recovery(self) -> bool:
        """Return whether the server is a standby."""
        return bool(self.value("SELECT pg_is_in_recovery()"))

    def configure(self, **settings: str) -> None:
        """Change settings that need no restart (``ALTER SYSTEM`` and reload).

        Those that were given when the server was made can not be changed: they are on its command
        line.
        """
        with self.connect() as connection:
            for name, value in settings.items():
                connection.execute(f"ALTER SYSTEM SET {name} = '{value}'".encode())
            connection.execute("SELECT pg_reload_conf()")
        for name, value in settings.items():
            wait_until(functools.partial(self._is_set, name, value), f"{self.name} reads {name}")

    def _is_set(self, name: str, value: str) -> bool:
        return bool(self.value(f"SHOW {name}") == value)

    # -- what a standby can do --------------------------------------------------------------------

    def pause_replay(self) -> None:
        """Receive WAL, but do not apply it, until :meth:`resume_replay`."""
        self.fetch("SELECT pg_wal_replay_pause()")
        wait_until(
            lambda: self.value("SELECT pg_get_wal_replay_pause_state()") == "paused",
            f"{self.name} pauses its replay",
        )

    def resume_replay(self) -> None:
        """Apply WAL again."""
        self.fetch("SELECT pg_wal_replay_resume()")

    def promote(self, *, wait: bool = True) -> None:
        """Make a primary of the standby, on a timeline of its own."""
        self.fetch("SELECT pg_promote(false)")
        if wait:
            wait_until(lambda: not self.is_in_recovery(), f"{self.name} is promoted")


@dataclass
class PostgresCluster:
    """A primary and its standbys."""

    primary: PostgresServer
    standbys: list[PostgresServer] = field(default_factory=list)
    _add: Callable[[PostgresServer, str], PostgresServer] = field(repr=False, kw_only=True)

    def add_standby(self, primary: PostgresServer | None = None) -> PostgresServer:
        """Copy the primary, or another server, and start the copy as a standby of it."""
        name = f"standby{len(self.standbys) + 1}"
        standby = self._add(primary or self.primary, name)
        self.standbys.append(standby)
        return standby

    def follow(self, standby: PostgresServer, primary: PostgresServer) -> None:
        """Let a standby follow another primary, as after a failover."""
        standby.configure(primary_conninfo=conninfo(primary, standby.name))

    def synchronous(self, *standbys: PostgresServer, level: str = "on") -> None:
        """Let COMMIT on the primary wait for one of these standbys, or for none.

        :param level: ``synchronous_commit`` of the primary: ``"on"``, ``"remote_apply"``, …
        """
        names = ", ".join(standby.name for standby in standbys)
        self.primary.configure(
            synchronous_commit=level,
            synchronous_standby_names=f"ANY 1 ({names})" if names else "",
        )
        for standby in standbys:
            wait_until(
                lambda: self.primary.fetch(
                    "SELECT 1 FROM pg_stat_replication WHERE application_name = %s"
                    " AND sync_state = 'quorum' AND state = 'streaming'",
                    standby.name,  # noqa: B023
                ),
                f"{standby.name} is synchronous",
            )

    def wait_caught_up(self, standby: PostgresServer | None = None, timeout: float = 60) -> None:
        """Wait until a standby, or all, have applied what the primary has now."""
        position = self.primary.value("SELECT pg_current_wal_lsn()")
        for each in [standby] if standby else self.standbys:
            wait_until(
                functools.partial(
                    each.value, "SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", position
                ),
                f"{each.name} reaches {position}",
                timeout=timeout,
            )


def conninfo(server: PostgresServer, name: str) -> str:
    """Return how a standby of this name connects to a primary."""
    return f"host={server.host} port={server.port} user=postgres application_name={name}"


@contextlib.contextmanager
def postgres_cluster(
    standbys: int = 1, settings: Mapping[str, str] | None = None
) -> Iterator[PostgresCluster]:
    """Start a PostgreSQL primary and its standbys, about a second for one.

    :param standbys: How many standbys; others by :meth:`PostgresCluster.add_standby`.
    :param settings: More settings of all servers.
    """
    with directory("postgres") as place, contextlib.ExitStack() as stack:
        bin_ = _installation(place) / "bin"

        def make(name: str, more: Mapping[str, str]) -> PostgresServer:
            every = {**PRIMARY_SETTINGS, **more, **(settings or {})}
            server = PostgresServer(bin_, place, name, every)
            stack.callback(server.kill)
            return server

        def add(primary: PostgresServer, name: str) -> PostgresServer:
            standby = make(name, STANDBY_SETTINGS)
            run(
                [
                    *(bin_ / "pg_basebackup", "-D", standby.data, "-c", "fast", "--no-sync"),
                    *("-h", primary.host, "-p", str(primary.port), "-U", "postgres"),
                ],
                place,
            )
            with (standby.data / "postgresql.auto.conf").open("a") as config:
                config.write(f"primary_conninfo = '{conninfo(primary, name)}'\n")
            (standby.data / "standby.signal").touch()
            standby.start()
            return standby

        primary = make("primary", {})
        run(
            [
                *(bin_ / "initdb", "-D", primary.data, "--username=postgres", "--auth=trust"),
                *("--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions"),
            ],
            place,
        )
        primary.start()
        cluster = PostgresCluster(primary, _add=add)
        for _ in range(standbys):
            cluster.add_standby()
        yield cluster


def _installation(place: Path) -> Path:
    # The wheel's, copied where the servers' user can not read it.
    found = postgres.installation()
    if not identity() or all(path.stat().st_mode & 0o001 for path in found.parents):
        return found
    return postgres_keeper.copy(found, place / "copy")


class PgBouncer:
    """A PgBouncer in front of one PostgreSQL server."""

    def __init__(
        self, program: str, place: Path, target: URL, settings: Mapping[str, str]
    ) -> None:
        self.host = "127.0.0.1"
        self.port = free_port()
        self.target = target
        self.settings = {
            "listen_addr": self.host,
            "listen_port": str(self.port),
            "unix_socket_dir": "",
            "auth_type": "any",
            "pool_mode": "transaction",
            "default_pool_size": "4",
            "max_client_conn": "200",
            "admin_users": "postgres",
            **settings,
        }
        self._config = place / "pgbouncer.ini"
        self.process = Process([program, self._config], place, "pgbouncer")

    def url(self, *, driver: str = "psycopg") -> URL:
        """Return the SQLAlchemy URL of the database through the bouncer."""
        return self.target.set(drivername=f"postgresql+{driver}", host=self.host, port=self.port)

    def start(self) -> None:
        """Write its configuration and start it, again after :meth:`kill` or :meth:`stop`."""
        target = self.target
        lines = [
            "[databases]",
            f"{target.database} = host={target.host} port={target.port} user={target.username}",
            "[pgbouncer]",
            *(f"{name} = {value}" for name, value in self.settings.items()),
        ]
        self._config.write_text("\n".join([*lines, ""]))
        self.process.start()
        self.process.wait_ready(lambda: self.admin("SHOW VERSION"))

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        self.process.kill()

    def stop(self) -> None:
        """Stop it at once, with its connections."""
        self.process.stop(signal.SIGTERM)

    def restart(self) -> None:
        """Stop it, and start it again on the same port."""
        self.stop()
        self.start()

    def admin(self, command: str) -> list[tuple[Any, ...]]:
        """Run a command of its console (``SHOW POOLS``, ``PAUSE``, ``RECONNECT``, …)."""
        connection = psycopg.connect(
            host=self.host, port=self.port, user="postgres", dbname="pgbouncer", autocommit=True
        )
        with contextlib.closing(connection):
            # The console knows simple queries only, and no parameters.
            result = connection.pgconn.exec_(command.encode())
            if result.error_message:
                raise RuntimeError(result.error_message.decode())
            return [
                tuple(_text(result.get_value(row, column)) for column in range(result.nfields))
                for row in range(result.ntuples)
            ]

    def version(self) -> tuple[int, ...]:
        """Return the version of the program."""
        ((text,),) = self.admin("SHOW VERSION")
        return tuple(int(part) for part in text.split()[1].split("."))


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode()


@contextlib.contextmanager
def pgbouncer(target: URL, **settings: str) -> Iterator[PgBouncer]:
    """Start a PgBouncer in transaction mode in front of the server and database of a URL.

    :param settings: More settings of its section ``[pgbouncer]``, as text.
    """
    program = require("pgbouncer", "pgbouncer")
    with directory("pgbouncer") as place:
        bouncer = PgBouncer(program, place, target, settings)
        try:
            bouncer.start()
            yield bouncer
        finally:
            bouncer.kill()
