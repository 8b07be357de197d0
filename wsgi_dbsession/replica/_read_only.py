"""An engine for reads: one round trip for each statement, and the server refuses writes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import Engine, create_engine, event, make_url
from sqlalchemy.exc import InvalidRequestError

from wsgi_dbsession._driver import READ_ONLY, codes
from wsgi_dbsession._report import add_note
from wsgi_dbsession._spoiled import spoil

if TYPE_CHECKING:
    from sqlalchemy import URL
    from sqlalchemy.engine import ExceptionContext
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.pool import ConnectionPoolEntry


class _Server(NamedTuple):
    """How to make a connection to one kind of server read-only, and how to check that it is."""

    setting: str
    query: str
    command: str | None = None  # None: the setting is a startup parameter


_POSTGRESQL = _Server("default_transaction_read_only", "SHOW default_transaction_read_only")
_MYSQL = _Server(
    "transaction_read_only",
    "SHOW SESSION VARIABLES WHERE Variable_name IN ('transaction_read_only', 'tx_read_only')",
    "SET SESSION TRANSACTION READ ONLY",
)
_SQLITE = _Server("query_only", "PRAGMA query_only", "PRAGMA query_only = ON")
_SERVERS = {
    "postgresql": _POSTGRESQL,
    "cockroachdb": _POSTGRESQL,
    "mysql": _MYSQL,
    "mariadb": _MYSQL,
    "sqlite": _SQLITE,
}

_REFUSED = frozenset(
    {
        "25006",  # PostgreSQL: read_only_sql_transaction
        "1792",  # MySQL, MariaDB: the session's transactions are read-only
        "1290",  # MySQL, MariaDB: the server runs with --read-only
    }
)
_CHECKED = "wsgi_dbsession.read_only"  # key in the pool's `ConnectionPoolEntry.info`
_SAVEPOINTS = ("SAVEPOINT", "RELEASE SAVEPOINT", "ROLLBACK TO SAVEPOINT")


def read_only_engine(engine_or_url: Engine | URL | str, **options: Any) -> Engine:
    """Make an engine that reads in one round trip, and on which the server refuses each write.

    It has its own pool. Its connections are read-only and at AUTOCOMMIT, so SQLAlchemy sends no
    BEGIN, COMMIT or ROLLBACK. Each new connection is checked once, because a pooler may ignore
    the setting that makes it read-only.

    ::

        reads = read_only_engine(engine)
        Session = scoped_session(
            sessionmaker(class_=session_class(engine, reads)), scopefunc=current_scope
        )

    :param engine_or_url: the database's URL, or an engine, of which only the URL is used: pass its
        other arguments and register its listeners again.
    :param options: further arguments of ``create_engine()``, such as ``pool_size``.
    :return: the engine. Its isolation level cannot be changed.
    :raises ValueError: the database is not PostgreSQL, CockroachDB, MySQL, MariaDB or SQLite, or
        it is a SQLite database in memory, which other connections cannot read.
    :raises TypeError: ``isolation_level`` or ``pool_reset_on_return`` is among the options.
    """
    url = engine_or_url.url if isinstance(engine_or_url, Engine) else make_url(engine_or_url)
    server = _SERVERS.get(url.get_backend_name())
    shown = url.render_as_string()
    if server is None:
        msg = (
            f"engine_or_url must be one of {', '.join(_SERVERS)}, got {shown!r}. "
            "Use the engine of the primary for reads, too."
        )
        raise ValueError(msg)
    if server is _SQLITE and url.database in {None, "", ":memory:"}:
        msg = (
            f"engine_or_url must not be a SQLite database in memory, got {shown!r}. "
            "Use a file, which other connections can read."
        )
        raise ValueError(msg)
    if server is _POSTGRESQL:
        options["connect_args"] = _startup_parameter(url, options.get("connect_args") or {})
    options["execution_options"] = {
        **(options.get("execution_options") or {}),
        READ_ONLY: True,
    }
    engine = create_engine(url, isolation_level="AUTOCOMMIT", pool_reset_on_return=None, **options)
    # These connections never have a transaction. `skip_autocommit_rollback` is missing in
    # SQLAlchemy 2.0.20, and does not skip COMMIT, which PyMySQL and pg8000 send to the server.
    dialect: Any = engine.dialect
    dialect.do_commit = dialect.do_rollback = _do_nothing
    setattr(dialect, READ_ONLY, True)  # for listeners of the pool, which has no execution options
    event.listen(engine, "checkout", _Check(server))
    event.listen(engine, "handle_error", _explain, retval=True)
    event.listen(engine, "set_connection_execution_options", _keep_autocommit)
    event.listen(engine, "set_engine_execution_options", _keep_autocommit)
    return engine


def is_refused_write(error: BaseException) -> bool:
    """Return whether a database refused a write because of a read-only transaction or server.

    :param error: an exception of SQLAlchemy, or of the driver; its cause is not considered.
    """
    if any(code in _REFUSED for code in codes(error)):
        return True
    # sqlite3 has the code, SQLITE_READONLY, as an attribute only since Python 3.11.
    return "attempt to write a readonly database" in str(getattr(error, "orig", error))


def _startup_parameter(url: URL, connect_args: dict[str, Any]) -> dict[str, Any]:
    """Return connect_args with the startup parameter that makes a connection read-only.

    SET would not suffice: a pooler such as PgBouncer may execute it on one connection to the
    server, and later statements on another.
    """
    name, value = _POSTGRESQL.setting, "on"
    if url.get_driver_name() == "pg8000":
        parameters: dict[str, Any] = {**(connect_args.get("startup_params") or {}), name: value}
        return {**connect_args, "startup_params": parameters}
    # libpq reads the environment variable only if it is given no options.
    given: str | tuple[str, ...] = (
        connect_args.get("options") or url.query.get("options") or os.environ.get("PGOPTIONS", "")
    )
    parts = [given] if isinstance(given, str) else given
    return {**connect_args, "options": " ".join([*parts, f"-c {name}={value}"]).strip()}


def _do_nothing(dbapi_connection: DBAPIConnection) -> None:
    pass


class _Check:
    """Makes each new connection read-only, and refuses it if that has no effect.

    It runs at the first checkout, because SQLAlchemy closes a connection whose "checkout" listener
    fails. SQLAlchemy 2.0 does not close one whose "connect" listener fails.
    """

    def __init__(self, server: _Server) -> None:
        self._server = server

    def __call__(
        self, connection: DBAPIConnection, entry: ConnectionPoolEntry, proxy: object
    ) -> None:
        if _CHECKED in entry.info:
            return
        server = self._server
        cursor = connection.cursor()
        try:
            if server.command is not None:
                cursor.execute(server.command)
            cursor.execute(server.query)
            row: Any = cursor.fetchone()
        finally:
            cursor.close()
        answer = row and str(row[-1])
        if answer not in {"on", "ON", "1"}:
            msg = (
                f"{server.setting} must be on in connections of a read_only_engine, got "
                f"{answer!r}: the server, or a pooler such as PgBouncer, ignores it, so that "
                f"writes would take place. {_NO_POOLER}"
            )
            raise RuntimeError(msg)
        entry.info[_CHECKED] = True


_NO_POOLER = (
    "Connect to the server itself, or let the pooler ignore the startup parameter and set "
    "default_transaction_read_only for the database role of these connections."
)
_ELSEWHERE = (
    "Run it in a transaction on the primary: set current_scope().read_only = False before the "
    "first statement, or use `with session_scope(Session):`."
)


def _explain(context: ExceptionContext) -> Exception | None:
    """Add the fix to an error that a read-only connection or AUTOCOMMIT has caused."""
    error = context.sqlalchemy_exception
    connection = context.connection
    if error is None:  # not an error of the driver
        return None
    if connection is None:
        if "startup parameter" in str(error):
            msg = f"a pooler refuses the startup parameter of a read_only_engine. {_NO_POOLER}"
            return RuntimeError(msg)
        return None
    if is_refused_write(error):
        add_note(error, f"The connection is read-only. {_ELSEWHERE}")
        spoil(connection, error)
        return None
    if not _needs_transaction(error):
        return None
    execution: Any = context.execution_context
    if execution is not None and execution.execution_options.get("stream_results"):
        what = "stream_results (which yield_per sets)"
    elif (context.statement or "").startswith(_SAVEPOINTS):
        what = "begin_nested()"
    else:
        what = "this statement"
    msg = f"{what} needs a transaction, which a read_only_engine does not have. {_ELSEWHERE}"
    return InvalidRequestError(msg)


def _needs_transaction(error: BaseException) -> bool:
    # PostgreSQL: no_active_sql_transaction; MariaDB: SAVEPOINT does not exist.
    found = set(codes(error))
    # psycopg2 raises its own error, which has no code.
    return bool(found & {"25P01", "1305"}) or "named cursor outside of transactions" in str(error)


def _keep_autocommit(target: object, options: dict[str, Any]) -> None:
    level = options.get("isolation_level", "AUTOCOMMIT")
    if level != "AUTOCOMMIT":
        msg = f"isolation_level must be AUTOCOMMIT on a read_only_engine, got {level!r}. "
        raise ValueError(msg + _ELSEWHERE)
