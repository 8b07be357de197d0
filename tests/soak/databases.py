"""The databases of the bank: two of them on one server, that can be restarted."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import TYPE_CHECKING, Any, Protocol

import psycopg
import pymysql
from sqlalchemy import MetaData, create_engine

from tests.soak.history import Books, Entry
from tests.support.clusters import PostgresServer, postgres_cluster
from tests.support.galera import MariaDBServer, mariadb
from wsgi_dbsession.idempotency import idempotency_table

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from sqlalchemy import URL

    Rows = list[tuple[Any, ...]]

ACCOUNTS = 16
START = 1000
TOTAL = ACCOUNTS * START
METADATA = MetaData()
KEYS = idempotency_table(METADATA)

BANK = (
    "CREATE TABLE account (id int PRIMARY KEY, balance int NOT NULL)",
    "INSERT INTO account VALUES "
    + ", ".join(f"({number}, {START})" for number in range(ACCOUNTS)),
    """CREATE TABLE entry (
        id varchar(100) PRIMARY KEY, token varchar(60) NOT NULL,
        source int NOT NULL, target int NOT NULL, amount int NOT NULL)""",
    "CREATE INDEX entry_token ON entry (token)",
    "CREATE TABLE attempt (token varchar(60) NOT NULL)",
    "CREATE TABLE marker (id int PRIMARY KEY)",
    "INSERT INTO marker VALUES (1)",
)
BRANCH = ("CREATE TABLE entry (token varchar(60) NOT NULL)",)
CLEAR = {
    "bank": (
        "DELETE FROM entry",
        "DELETE FROM attempt",
        "DELETE FROM idempotency_key",
        f"UPDATE account SET balance = {START}",
    ),
    "branch": ("DELETE FROM entry",),
}


class Database(Protocol):
    """A server with the two databases ``bank`` and ``branch``."""

    name: str
    #: the works and mounts that it cannot do
    lacks: frozenset[str]
    #: what each round takes in turn
    drivers: tuple[str, ...]
    isolations: tuple[str, ...]

    def url(self, database: str) -> URL:
        """Return the SQLAlchemy URL of a database."""

    def fetch(self, database: str, statement: str) -> Rows:
        """Run one statement on a connection of its own, and return its rows."""

    def restart(self) -> None:
        """Stop the server at once, as a crash does, and start it again."""

    def terminate(self, chance: random.Random) -> int:
        """End some of the application's connections, and return how many."""

    def busy(self) -> list[str]:
        """Describe the application's transactions that are open."""


def prepare(database: Database) -> None:
    """Make the tables."""
    for name, statements in (("bank", BANK), ("branch", BRANCH)):
        for statement in statements:
            database.fetch(name, statement)
    engine = create_engine(database.url("bank"))
    METADATA.create_all(engine)
    engine.dispose()


def clear(database: Database) -> None:
    """Empty the books, but for the accounts."""
    for name, statements in CLEAR.items():
        for statement in statements:
            database.fetch(name, statement)


def read(database: Database) -> Books:
    """Return what the books say."""
    rows = database.fetch("bank", "SELECT token, source, target, amount FROM entry")
    return Books(
        [Entry(*row) for row in rows],
        dict(database.fetch("bank", "SELECT id, balance FROM account")),
        Counter(token for (token,) in database.fetch("branch", "SELECT token FROM entry")),
        Counter(token for (token,) in database.fetch("bank", "SELECT token FROM attempt")),
    )


class PostgreSQL:
    """PostgreSQL, with time-outs of its locks, so that nothing waits for long."""

    name = "PostgreSQL"
    lacks: frozenset[str] = frozenset()
    drivers: tuple[str, ...] = ("psycopg", "psycopg2", "pg8000")
    isolations: tuple[str, ...] = (
        "READ COMMITTED",
        "SERIALIZABLE",
        "READ COMMITTED",
        "REPEATABLE READ",
    )
    #: what its driver raises while the server is down, and for what is not there any more
    error = psycopg.OperationalError
    missing = psycopg.errors.UndefinedObject

    def __init__(self, server: PostgresServer) -> None:
        self.server = server
        for name in ("bank", "branch"):
            self._fetch("postgres", f"CREATE DATABASE {name}")
            for setting in ("lock_timeout = '2s'", "statement_timeout = '5s'"):
                self._fetch("postgres", f"ALTER DATABASE {name} SET {setting}")
        self._fetch("bank", DEFERRED_TABLES)

    def url(self, database: str) -> URL:
        return self.server.url(database)

    def fetch(self, database: str, statement: str) -> Rows:
        return self._fetch(database, statement)

    def _fetch(self, database: str, statement: str) -> Rows:
        with self.server.connect(database) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def restart(self) -> None:
        self.server.restart("immediate")

    def terminate(self, chance: random.Random) -> int:
        found = self._fetch("postgres", f"SELECT pid {FROM_ACTIVITY}")
        chosen = [pid for (pid,) in found if chance.random() < 0.4]
        for pid in chosen:
            self._fetch("postgres", f"SELECT pg_terminate_backend({pid})")
        return len(chosen)

    def busy(self) -> list[str]:
        with contextlib.suppress(psycopg.OperationalError):
            rows = self._fetch(
                "postgres", f"SELECT pid, state, query {FROM_ACTIVITY} AND state <> 'idle'"
            )
            return [" ".join(map(str, row)) for row in rows]
        return ["the server does not answer"]


DEFERRED_TABLES = (
    "CREATE TABLE parent (id int PRIMARY KEY);"
    "CREATE TABLE child (parent int NOT NULL REFERENCES parent DEFERRABLE INITIALLY DEFERRED)"
)
FROM_ACTIVITY = (
    "FROM pg_stat_activity WHERE datname IN ('bank', 'branch') AND application_name <> 'tests'"
    " AND backend_type = 'client backend'"
)


@contextlib.contextmanager
def postgres() -> Iterator[Database]:
    """Start PostgreSQL with the tables of the bank."""
    with postgres_cluster(0, {"max_prepared_transactions": "64"}) as cluster:
        database = PostgreSQL(cluster.primary)
        prepare(database)
        yield database


class MariaDB:
    """MariaDB, with a log that survives a crash of the process."""

    name = "MariaDB"
    # Its prepared transactions are found by no client after a restart, and it has no deferred
    # constraints. After an error in a statement it keeps the transaction: see ``swallowed``.
    lacks = frozenset({"two-phase", "deferred constraint"})
    drivers: tuple[str, ...] = ("pymysql",)
    isolations: tuple[str, ...] = ("READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE")

    def __init__(self, server: MariaDBServer) -> None:
        self.server = server
        for name in ("bank", "branch"):
            server.fetch(f"CREATE DATABASE {name}")

    def url(self, database: str) -> URL:
        return self.server.url(database)

    def fetch(self, database: str, statement: str) -> Rows:
        with contextlib.closing(self.server.connect(database)) as connection:
            cursor = connection.cursor()
            cursor.execute(statement)
            return list(cursor.fetchall())

    def restart(self) -> None:
        self.server.kill()
        self.server.start()

    def terminate(self, chance: random.Random) -> int:
        found = self.server.fetch(
            "SELECT id FROM information_schema.processlist WHERE db IN ('bank', 'branch')"
            " AND id <> CONNECTION_ID()"
        )
        chosen = [number for (number,) in found if chance.random() < 0.4]
        for number in chosen:
            with contextlib.suppress(pymysql.OperationalError):  # it has ended by itself
                self.server.fetch(f"KILL {number}")
        return len(chosen)

    def busy(self) -> list[str]:
        rows = self.server.fetch(
            "SELECT trx_mysql_thread_id, trx_state, trx_query FROM information_schema.innodb_trx"
            " WHERE trx_mysql_thread_id <> 0"
        )
        return [" ".join(map(str, row)) for row in rows]


@contextlib.contextmanager
def mariadb_bank() -> Iterator[Database]:
    """Start MariaDB with the tables of the bank."""
    options = (
        # The log is written at each commit; the default of these servers loses a second.
        "--innodb-flush-log-at-trx-commit=2",
        "--innodb-lock-wait-timeout=2",
        "--innodb-snapshot-isolation=ON",
    )
    with mariadb(*options) as server:
        database = MariaDB(server)
        prepare(database)
        yield database


DATABASES = {"postgres": postgres, "mariadb": mariadb_bank}
