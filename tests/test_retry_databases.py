"""What drivers and servers say of lost races and broken connections, and what is made of it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError, IllegalStateChangeError, OperationalError
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from tests import postgres
from tests.models import Note, make_engine
from tests.test_retry import Reply, ask, flask_app, list_app, make_environ, protect
from wsgi_dbsession import SessionMiddleware, current_scope, session_scope
from wsgi_dbsession.retry import RETRYABLE_CODES, Retry, is_retryable, run_transaction

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import URL, Engine

    from tests.models import Database

DRIVERS = ["psycopg", "psycopg2", "pg8000"]


def registry_of(engine: Engine, **options: Any) -> scoped_session[Session]:
    return scoped_session(sessionmaker(engine, **options), scopefunc=current_scope)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    """The name of each PostgreSQL driver in turn."""
    name: str = request.param
    return name


@contextlib.contextmanager
def engine_of(url: URL, driver: str) -> Iterator[Engine]:
    """Make an engine without ``pool_pre_ping``, that leaves no broken socket behind."""
    engine = make_engine(url.set(drivername=f"postgresql+{driver}"))
    sockets: list[Any] = []

    def keep(connection: object, _: object) -> None:
        # pg8000 forgets them, not closed, where it cannot say goodbye to the server.
        sockets.extend(getattr(connection, name, None) for name in ("_sock", "_usock"))

    event.listen(engine, "connect", keep)
    try:
        yield engine
    finally:
        engine.dispose()
        for each in sockets:
            with contextlib.suppress(OSError):
                if each is not None:
                    each.close()


@pytest.fixture
def engine(driver: str, postgres_database: Database) -> Iterator[Engine]:
    """An engine of each driver; at the test's end no connection may be checked out."""
    with engine_of(postgres_database.url, driver) as made:
        yield made
        pool: Any = made.pool
        assert pool.checkedout() == 0


# -- codes ----------------------------------------------------------------------------------------


def race_of(one: Engine, *statements: str) -> list[BaseException]:
    """Run transactions of two statements, that meet between them, and return their errors."""
    meeting = threading.Barrier(2, timeout=60)
    errors: list[BaseException] = []

    def run(first: str, second: str) -> None:
        try:
            with one.connect() as connection:
                try:
                    connection.execute(text(first))
                finally:
                    meeting.wait()
                connection.execute(text(second))
                connection.commit()
        except DBAPIError as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=statements[i : i + 2]) for i in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return errors


def test_a_deadlock_of_postgresql_is_retryable(
    engine: Engine, postgres_database: Database
) -> None:
    """Each driver shows 40P01 in its own way."""
    with postgres_database.observer.begin() as connection:
        connection.execute(text("INSERT INTO note (text) VALUES ('one'), ('two')"))
    one, two = (f"UPDATE note SET text = 'new' WHERE id = {number}" for number in (1, 2))

    (error,) = race_of(engine, one, two, two, one)

    assert is_retryable(error)
    assert isinstance(error, DBAPIError)
    assert is_retryable(error.orig or error)


def test_a_serialization_failure_of_postgresql_is_retryable(
    engine: Engine, postgres_database: Database
) -> None:
    """The same for 40001."""
    with postgres_database.observer.begin() as connection:
        connection.execute(text("INSERT INTO note (text) VALUES ('one')"))
    repeatable = engine.execution_options(isolation_level="REPEATABLE READ")
    read, write = "SELECT * FROM note", "UPDATE note SET text = text || '!'"

    (error,) = race_of(repeatable, read, write, read, write)

    assert is_retryable(error)


def test_another_error_of_postgresql_is_not_retryable(engine: Engine) -> None:
    """Neither a violated constraint nor a mistake is a lost race."""
    for statement in ("INSERT INTO note (id) VALUES (1), (1)", "SELECT nonsense"):
        with engine.connect() as connection, pytest.raises(DBAPIError) as caught:
            connection.execute(text(statement))
        assert not is_retryable(caught.value)


def like(*bases: type, **attributes: Any) -> Any:
    """Make an error as a driver that is not here documents it."""
    error = type("OperationalError", bases, {})(*attributes.pop("args", ()))
    for name, value in attributes.items():
        setattr(error, name, value)
    return error


class DatabaseError(Exception):
    """PEP 249's, as each driver has one."""


class Details:
    """What oracledb and cx_Oracle have as an error's only argument."""

    def __init__(self, code: int) -> None:
        self.code = code


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        pytest.param(Retry(), True, id="Retry"),
        pytest.param(like(Exception, sqlstate="40001"), True, id="asyncpg"),
        pytest.param(
            like(DatabaseError, sqlstate="HY000", args=(1205, "Lock wait timeout", "HY000")),
            True,
            id="mysql-connector, lock wait timeout",
        ),
        pytest.param(like(DatabaseError, args=(1213, "Deadlock found")), True, id="mysqlclient"),
        pytest.param(like(DatabaseError, args=(1062, "Duplicate")), False, id="duplicate"),
        pytest.param(
            like(DatabaseError, args=("40001", "[40001] chosen as the deadlock victim")),
            True,
            id="pyodbc",
        ),
        pytest.param(
            like(DatabaseError, args=("23000", "[23000] ...")), False, id="pyodbc, other"
        ),
        pytest.param(like(DatabaseError, args=(Details(8177),)), True, id="oracledb, ORA-08177"),
        pytest.param(like(DatabaseError, args=(Details(60),)), True, id="oracledb, ORA-00060"),
        pytest.param(like(DatabaseError, args=(Details(1),)), False, id="oracledb, ORA-00001"),
        pytest.param(like(DatabaseError, args=(None,)), False, id="no code"),
        pytest.param(like(DatabaseError), False, id="no argument"),
        pytest.param(like(OSError, args=(1205, "an error of the system")), False, id="OSError"),
        pytest.param(ValueError("40001"), False, id="no error of a database"),
    ],
)
def test_the_codes_of_other_drivers_are_found(error: Exception, expected: bool) -> None:
    """They stand where the driver's documentation says, raw or wrapped by SQLAlchemy."""
    assert is_retryable(error) is expected
    if not isinstance(error, Retry):
        assert is_retryable(DBAPIError("SELECT 1", {}, error)) is expected


def test_the_table_of_the_documentation_is_the_table() -> None:
    """``docs/retry.md`` lists each code, in the order of the code."""
    path = Path(__file__).parents[1] / "docs" / "retry.md"
    rows = [line.split("|") for line in path.read_text().splitlines() if line.startswith("| `")]
    listed = {row[1].strip().strip("`"): row[2].strip() for row in rows}
    assert listed == dict(RETRYABLE_CODES)


# -- connections that broke -----------------------------------------------------------------------


def add_note(registry: scoped_session[Session]) -> None:
    registry.add(Note(text="note"))
    registry.flush()


@pytest.mark.parametrize("framework", [list_app, flask_app], ids=["raised", "error page"])
@pytest.mark.parametrize("at", ["between requests", "in mid-transaction"])
def test_a_connection_that_was_ended_before_the_commit_is_not_noticed(
    at: str,
    framework: Any,
    engine: Engine,
    postgres_admin: postgres.Admin,
    postgres_database: Database,
) -> None:
    """No client sees a 500 because of a stale pooled connection, and one note stays one."""
    registry = registry_of(engine)
    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        add_note(registry)
        if at == "in mid-transaction" and len(attempts) == 1:
            postgres_admin.terminate()
        registry.execute(text("SELECT 1"))

    # The pool is full of connections that are all dead afterwards.
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(engine.connect())
    if at == "between requests":
        assert postgres_admin.terminate() == 5

    reply = ask(protect(framework(work), registry), "POST")

    assert (reply.status, reply.body, len(attempts)) == ("200 OK", b"done", 2)
    assert postgres_database.notes() == ["note"]


def test_a_stale_connection_is_seen_without_the_middleware(
    engine: Engine, postgres_admin: postgres.Admin
) -> None:
    """What the middleware hides is there: without it the client gets a 500."""
    registry = registry_of(engine)
    with engine.connect():
        pass
    postgres_admin.terminate()

    app = protect(flask_app(lambda: add_note(registry)), registry, attempts=1)

    assert ask(app, "POST").status[:3] == "500"


class Proxy:
    """Stands between a client and a database, and breaks the connection at a COMMIT.

    The server gets the COMMIT; the client does not get the answer.
    """

    POSTGRESQL = b"C\x00\x00\x00\x0bCOMMIT\x00"  # in the server's answer
    MYSQL = b"\x03COMMIT"  # in the client's command

    def __init__(self, host: str, port: int, commit: bytes) -> None:
        self.commits = 0
        self._commit = commit
        self._target = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            broken = threading.Event()
            for source, sink in ((client, server), (server, client)):
                threading.Thread(
                    target=self._copy, args=(source, sink, broken, source is client), daemon=True
                ).start()

    def _copy(
        self, source: socket.socket, sink: socket.socket, broken: threading.Event, is_client: bool
    ) -> None:
        with source, sink, contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if self._commit in data:
                    self.commits += 1
                    broken.set()
                if broken.is_set() and not is_client:
                    break
                sink.sendall(data)
            for each in (source, sink):
                each.shutdown(socket.SHUT_RDWR)


def assert_unknown(
    caplog: pytest.LogCaptureFixture, error: BaseException, what: str = "POST /path"
) -> None:
    assert "It is unknown whether the COMMIT took place." in str(error)
    assert any(
        record.levelname == "ERROR"
        and record.getMessage().startswith(f"{what}: it is unknown whether its COMMIT took place")
        for record in caplog.records
    )


@pytest.fixture
def proxy(postgres_database: Database) -> Iterator[Proxy]:
    """A way to PostgreSQL on which the answers to COMMIT are lost."""
    url = postgres_database.url
    assert url.host is not None
    assert url.port is not None
    made = Proxy(url.host, url.port, Proxy.POSTGRESQL)
    yield made
    made.close()


@pytest.fixture
def proxied(proxy: Proxy, driver: str, postgres_database: Database) -> Iterator[Engine]:
    """An engine of each driver that takes this way."""
    with engine_of(postgres_database.url.set(port=proxy.port), driver) as engine:
        yield engine


@pytest.mark.parametrize("framework", [list_app, flask_app], ids=["raised", "error page"])
def test_an_outcome_that_is_unknown_is_never_run_again(
    framework: Any,
    proxy: Proxy,
    proxied: Engine,
    postgres_database: Database,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The answer to the COMMIT is lost: it took place, and the client cannot know."""
    registry = registry_of(proxied)
    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        add_note(registry)
        if framework is flask_app:
            registry.commit()  # what the framework swallows

    app = protect(framework(work), registry)
    if framework is list_app:
        with pytest.raises(DBAPIError) as caught:
            ask(app, "POST")
        assert_unknown(caplog, caught.value)
        assert not is_retryable(caught.value)
    else:
        assert ask(app, "POST").status[:3] == "500"

    assert (len(attempts), proxy.commits) == (1, 1)
    wait_until(postgres_database.notes)
    assert postgres_database.notes() == ["note"]


def test_a_job_whose_outcome_is_unknown_is_never_run_again(
    proxy: Proxy,
    proxied: Engine,
    postgres_database: Database,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The same for ``run_transaction``."""
    registry = registry_of(proxied)

    def job() -> None:
        add_note(registry)

    with pytest.raises(DBAPIError) as caught:
        run_transaction(job, registry, backoff=0)

    assert_unknown(caplog, caught.value, f"{job.__qualname__}()")
    assert proxy.commits == 1
    wait_until(postgres_database.notes)


def _do_at_commit(connection: Any, statement: str) -> None:
    """Let every COMMIT of a new author do something on the server."""
    for each in (
        f"""CREATE OR REPLACE FUNCTION at_commit() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN {statement}; RETURN NULL; END $$""",
        """CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON author
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION at_commit()""",
    ):
        connection.exec_driver_sql(each)


@contextlib.contextmanager
def trigger_at_commit(database: Database, statement: str) -> Iterator[None]:
    """Let every COMMIT of a new author do something on the server, in this block."""
    with database.observer.begin() as connection:
        _do_at_commit(connection, statement)
    try:
        yield
    finally:
        with database.observer.begin() as connection:
            connection.exec_driver_sql("DROP TRIGGER at_commit ON author")


WAIT = "PERFORM pg_advisory_xact_lock(6)"
WAITING = (
    "SELECT pid FROM pg_locks JOIN pg_database ON pg_database.oid = database"
    " WHERE datname = %s AND locktype = 'advisory' AND NOT granted"
)


def waiting_for_lock(admin: postgres.Admin) -> list[int]:
    return [pid for (pid,) in admin.fetch(WAITING, admin.database)]


@contextlib.contextmanager
def held_commits(database: Database) -> Iterator[None]:
    """Let every COMMIT of a new author wait until the end of the block."""
    with trigger_at_commit(database, WAIT), database.observer.connect() as holder:
        holder.execute(text("SELECT pg_advisory_lock(6)"))
        yield


def test_a_connection_that_was_ended_during_commit_is_never_run_again(
    engine: Engine,
    postgres_admin: postgres.Admin,
    postgres_database: Database,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """``pg_terminate_backend`` hits a COMMIT: this one did not take place, but nobody can know."""
    registry = registry_of(engine)
    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        registry.execute(text("INSERT INTO author (name) VALUES ('somebody')"))

    errors: list[BaseException] = []

    def request() -> None:
        try:
            ask(protect(list_app(work), registry), "POST")
        except DBAPIError as error:
            errors.append(error)

    with held_commits(postgres_database):
        thread = threading.Thread(target=request)
        thread.start()
        wait_until(lambda: waiting_for_lock(postgres_admin))
        (pid,) = waiting_for_lock(postgres_admin)
        postgres_admin.terminate(pid)
        thread.join(60)

    assert len(attempts) == 1
    (error,) = errors
    assert_unknown(caplog, error)


@pytest.mark.parametrize("code", ["40003", "08006", "57P01"])
def test_an_answer_to_commit_that_leaves_it_open_is_never_run_again(
    code: str, engine: Engine, postgres_database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """CockroachDB's 40003, a lost connection, an operator: the server itself does not promise."""
    registry = registry_of(engine)
    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        registry.execute(text("INSERT INTO author (name) VALUES ('somebody')"))

    with (
        trigger_at_commit(postgres_database, f"RAISE SQLSTATE '{code}'"),
        pytest.raises(DBAPIError) as caught,
    ):
        ask(protect(list_app(work), registry), "POST")
    assert len(attempts) == 1
    assert_unknown(caplog, caught.value)

    with (
        trigger_at_commit(postgres_database, "RAISE SQLSTATE '40001'"),
        pytest.raises(DBAPIError),
    ):
        ask(protect(list_app(work), registry), "POST")
    assert len(attempts) == 4


class Interruption(BaseException):
    """As a ``gevent.Timeout`` or a ``GreenletExit`` is one."""


def test_a_commit_that_was_interrupted_is_told(
    postgres_admin: postgres.Admin,
    postgres_database: Database,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A timeout that hits a COMMIT is not run again either, and the outcome is unknown."""
    registry = registry_of(postgres_database.engine)
    main = threading.get_ident()

    def interrupt(*_: object) -> None:
        raise Interruption

    def wait_and_interrupt() -> None:
        wait_until(lambda: waiting_for_lock(postgres_admin))
        signal.pthread_kill(main, signal.SIGUSR1)

    def work() -> None:
        registry.execute(text("INSERT INTO author (name) VALUES ('somebody')"))

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with held_commits(postgres_database):
            thread = threading.Thread(target=wait_and_interrupt)
            thread.start()
            with pytest.raises(Interruption):
                ask(protect(list_app(work), registry), "POST")
            thread.join(60)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert any("it is unknown whether its COMMIT" in message for message in caplog.messages)


def test_a_rollback_that_fails_does_not_hide_the_cause(
    engine: Engine, postgres_admin: postgres.Admin, postgres_database: Database
) -> None:
    """The race was lost before the connection, so the request is run again."""
    registry = registry_of(engine)
    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        add_note(registry)
        if len(attempts) == 1:
            try:
                registry.execute(text("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$"))
            except DBAPIError:
                postgres_admin.terminate()
                registry.rollback()

    assert ask(protect(flask_app(work), registry), "POST").body == b"done"
    assert (len(attempts), postgres_database.notes()) == (2, ["note"])


def test_a_connection_that_was_ended_between_the_phases_is_never_run_again(
    engine: Engine,
    postgres_database: Database,
    other_postgres_database: Database,
    postgres_admin: postgres.Admin,
) -> None:
    """A transaction that may have been prepared is in doubt: somebody may still commit it."""
    one = registry_of(other_postgres_database.engine, twophase=True)
    two = registry_of(engine, twophase=True)
    attempts: list[None] = []

    def end_it(connection: Any, xid: object) -> None:
        postgres_admin.terminate()

    event.listen(engine, "prepare_twophase", end_it)

    def work() -> None:
        attempts.append(None)
        add_note(one)
        add_note(two)

    # Older versions of SQLAlchemy trip over the error.
    with pytest.raises((DBAPIError, IllegalStateChangeError)):
        ask(protect(list_app(work), one, two), "POST")

    assert len(attempts) == 1
    assert postgres_database.notes() == other_postgres_database.notes() == []


def test_a_connection_that_broke_in_the_statement_of_a_phase_is_never_run_again(
    engine: Engine, postgres_admin: postgres.Admin, caplog: pytest.LogCaptureFixture
) -> None:
    """Some drivers, and applications, send the phases as statements."""
    registry = registry_of(engine)
    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        add_note(registry)
        postgres_admin.terminate()
        registry.execute(text("PREPARE TRANSACTION 'mine'"))

    with pytest.raises(DBAPIError) as caught:
        ask(protect(list_app(work), registry), "POST")

    assert len(attempts) == 1
    assert_unknown(caplog, caught.value)


# -- a restart ------------------------------------------------------------------------------------


class Cluster:
    """A PostgreSQL server of the test's own, that it can stop and start."""

    def __init__(self, run: postgres.Run) -> None:
        self.server = postgres.server(run.directory)
        self._data = run.directory / "data"
        # The keeper's copy where there is one: the original may be out of the server's reach.
        link = Path(f"/proc/{self._pid()}/exe")
        self._pg_ctl = str(link.resolve().with_name("pg_ctl"))

    def _pid(self) -> int:
        return int((self._data / "postmaster.pid").read_text().split()[0])

    def _control(self, *arguments: str) -> None:
        owner = self._data.stat().st_uid
        subprocess.run(
            [self._pg_ctl, "-D", str(self._data), "-s", "-w", "-t", "30", *arguments],
            check=True,
            cwd="/",
            user=owner if os.geteuid() == 0 else None,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
        )

    def restart(self) -> None:
        self._control("restart", "-m", "fast", "-l", str(self._data / "restart.log"))

    def stop(self) -> None:
        self._control("stop", "-m", "immediate")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A server that may be restarted without harm to other tests."""
    run = postgres.Run()
    try:
        made = Cluster(run)
        yield made
        made.stop()
    finally:
        run.end()


@pytest.fixture
def restarting(cluster: Cluster, driver: str) -> Iterator[Engine]:
    """An engine of the server that is restarted."""
    name = cluster.server.create_database("restart").database
    assert name is not None
    with engine_of(cluster.server.url(name), driver) as engine:
        Note.metadata.create_all(engine)
        yield engine


@pytest.mark.parametrize("at", ["between requests", "in mid-transaction"])
def test_a_restart_of_postgresql_before_the_commit_is_not_noticed(
    at: str, restarting: Engine, cluster: Cluster
) -> None:
    """When the server answers again, the request is run again on a new connection."""
    registry = registry_of(restarting)
    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        add_note(registry)
        if at == "in mid-transaction" and len(attempts) == 1:
            cluster.restart()
        registry.execute(text("SELECT 1"))

    if at == "between requests":
        cluster.restart()

    assert ask(protect(flask_app(work), registry), "POST").body == b"done"
    assert len(attempts) == 2
    with restarting.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM note")) == 1


def test_a_restart_of_postgresql_during_commit_is_never_run_again(
    restarting: Engine, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """The outcome is unknown then, and the log and the error say so."""
    registry = registry_of(restarting)
    attempts: list[None] = []
    errors: list[BaseException] = []

    def work() -> None:
        attempts.append(None)
        registry.execute(text("INSERT INTO author (name) VALUES ('somebody')"))

    def request() -> None:
        try:
            ask(protect(list_app(work), registry), "POST")
        except DBAPIError as error:
            errors.append(error)

    with restarting.begin() as connection:
        # Not for a lock: its holder may be ended first.
        _do_at_commit(connection, "PERFORM pg_sleep(60)")
    thread = threading.Thread(target=request)
    thread.start()
    with cluster.server.connect() as observer:
        sleeping = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
        wait_until(lambda: observer.execute(sleeping).fetchall())
    cluster.restart()
    thread.join(60)

    assert len(attempts) == 1
    (error,) = errors
    assert_unknown(caplog, error)


def test_a_server_that_is_down_is_not_waited_for(
    restarting: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """A refused connection is no lost race, unless the application says so."""
    url = restarting.url.set(port=postgres_free_port())
    engine = create_engine(url)
    registry = registry_of(engine)
    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        add_note(registry)

    def is_refused(error: BaseException) -> bool:
        return isinstance(error, DBAPIError) and error.statement is None

    assert ask(protect(flask_app(work), registry), "POST").status[:3] == "500"
    assert len(attempts) == 1
    app = protect(flask_app(work), registry, also=is_refused)
    assert ask(app, "POST").status[:3] == "500"
    assert len(attempts) == 4


def postgres_free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


# -- MariaDB and MySQL ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mysql_url() -> URL:
    """The server that TEST_MYSQL_URL names, or one at its usual place."""
    url = make_url(os.environ.get("TEST_MYSQL_URL", "mysql+pymysql://root@127.0.0.1:3306/test"))
    engine = create_engine(url)
    try:
        with engine.connect():
            pass
    except OperationalError as error:
        if "TEST_MYSQL_URL" in os.environ:
            raise
        pytest.skip(
            "NO MARIADB OR MYSQL: deadlocks and broken connections of PyMySQL are not tested. "
            f"Start one, or name one in TEST_MYSQL_URL (tried {url}: {error.orig})"
        )
    finally:
        engine.dispose()
    return url


@pytest.fixture
def mysql(mysql_url: URL) -> Iterator[Engine]:
    """An engine of that server, with a table of two accounts."""
    # A name for each worker: the database is the user's.
    name = f"wsgi_dbsession_{os.getpid()}"
    engine = create_engine(mysql_url)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"DROP TABLE IF EXISTS {name}")
        connection.exec_driver_sql(
            f"CREATE TABLE {name} (id INT PRIMARY KEY, n INT) ENGINE InnoDB"
        )
        connection.exec_driver_sql(f"INSERT INTO {name} VALUES (1, 0), (2, 0)")
    yield engine.execution_options(table=name)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"DROP TABLE {name}")
    engine.dispose()


def table_of(engine: Engine) -> str:
    name: str = engine.get_execution_options()["table"]
    return name


def numbers_in(engine: Engine) -> list[int]:
    with engine.connect() as connection:
        statement = text(f"SELECT n FROM {table_of(engine)} ORDER BY id")
        return list(connection.scalars(statement))


def count_up(engine: Engine, number: int) -> Any:
    return text(f"UPDATE {table_of(engine)} SET n = n + 1 WHERE id = {number}")


@pytest.mark.parametrize("framework", [list_app, flask_app], ids=["raised", "error page"])
def test_a_deadlock_of_mysql_is_not_noticed(framework: Any, mysql: Engine) -> None:
    """Two requests lock two rows crosswise: both are answered with success, both count."""
    registry = registry_of(mysql)
    meeting = threading.Barrier(2, timeout=60)
    attempts: list[int] = []

    def client(first: int, second: int) -> None:
        def work() -> None:
            again = first in attempts
            attempts.append(first)
            registry.execute(count_up(mysql, first))
            if not again:
                meeting.wait()
            registry.execute(count_up(mysql, second))

        replies.append(ask(protect(framework(work), registry), "POST"))

    replies: list[Reply] = []
    threads = [threading.Thread(target=client, args=pair) for pair in ((1, 2), (2, 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert [reply.body for reply in replies] == [b"done", b"done"]
    assert len(attempts) == 3
    assert numbers_in(mysql) == [2, 2]


def test_a_deadlock_of_mysql_is_seen_without_the_middleware(mysql: Engine) -> None:
    """What the middleware hides is there, and the table knows its code."""
    one, two = str(count_up(mysql, 1)), str(count_up(mysql, 2))
    (error,) = race_of(mysql, one, two, two, one)
    assert is_retryable(error)


def test_a_lock_wait_timeout_of_mysql_is_run_again(mysql: Engine) -> None:
    """MySQL rolls back only the statement, but the request rolls back everything."""
    registry = registry_of(mysql)
    attempts: list[None] = []
    other: Any = mysql.raw_connection()  # not in the request: there it might commit

    def work() -> None:
        attempts.append(None)
        registry.execute(text("SET innodb_lock_wait_timeout = 1"))
        registry.execute(count_up(mysql, 1))
        if len(attempts) == 1:
            other.cursor().execute(str(count_up(mysql, 2)))
        try:
            registry.execute(count_up(mysql, 2))
        finally:
            other.rollback()

    try:
        assert ask(protect(list_app(work), registry), "POST").body == b"done"
    finally:
        other.close()
    assert len(attempts) == 2
    assert numbers_in(mysql) == [1, 1]


def test_a_snapshot_of_mariadb_that_is_too_old_is_run_again(mysql: Engine) -> None:
    """With ``innodb_snapshot_isolation``, the default since MariaDB 11.6.2, that is error 1020."""
    with mysql.connect() as connection:
        found = connection.exec_driver_sql("SHOW VARIABLES LIKE 'innodb_snapshot_isolation'")
        if found.first() is None:
            pytest.skip(
                f"THIS SERVER HAS NO SNAPSHOT ISOLATION: {mysql.dialect.server_version_info}"
            )
    registry = registry_of(mysql)
    attempts: list[None] = []
    raw: Any = mysql.raw_connection()  # not in the request: there it might commit

    def work() -> None:
        attempts.append(None)
        registry.execute(text("SET innodb_snapshot_isolation = ON"))
        registry.execute(text(f"SELECT * FROM {table_of(mysql)}")).all()
        if len(attempts) == 1:
            raw.cursor().execute(str(count_up(mysql, 1)))
            raw.driver_connection.commit()
        registry.execute(count_up(mysql, 1))

    try:
        assert ask(protect(list_app(work), registry), "POST").body == b"done"
    finally:
        raw.close()
    assert len(attempts) == 2
    assert numbers_in(mysql) == [2, 0]


@pytest.mark.parametrize("at", ["between requests", "in mid-transaction"])
def test_a_connection_that_mysql_ended_before_the_commit_is_not_noticed(
    at: str, mysql: Engine
) -> None:
    """PyMySQL finds it dead when it sends the next statement."""
    registry = registry_of(mysql)
    attempts: list[None] = []
    pids: list[int] = []
    other: Any = mysql.raw_connection()  # not in the request: there it might commit

    def pid() -> int:
        return int(registry.scalar(text("SELECT connection_id()")) or 0)

    def kill(number: int) -> None:
        cursor = other.cursor()
        cursor.execute(f"KILL {number}")
        alive = f"SELECT 1 FROM information_schema.processlist WHERE id = {number}"
        wait_until(lambda: cursor.execute(alive) == 0)

    def work() -> None:
        attempts.append(None)
        registry.execute(count_up(mysql, 1))
        if at == "in mid-transaction" and len(attempts) == 1:
            kill(pid())
        registry.execute(count_up(mysql, 2))

    if at == "between requests":
        ask(protect(list_app(lambda: pids.append(pid())), registry))
        kill(pids[0])

    try:
        assert ask(protect(flask_app(work), registry), "POST").body == b"done"
    finally:
        other.close()
    assert len(attempts) == 2
    assert numbers_in(mysql) == [1, 1]


def test_an_outcome_of_mysql_that_is_unknown_is_never_run_again(
    mysql: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """The COMMIT took place, and its answer is lost: it counts once."""
    assert mysql.url.host is not None
    proxy = Proxy(mysql.url.host, mysql.url.port or 3306, Proxy.MYSQL)
    engine = create_engine(mysql.url.set(port=proxy.port))
    registry = registry_of(engine)

    with pytest.raises(DBAPIError) as caught:
        ask(protect(list_app(lambda: registry.execute(count_up(mysql, 1))), registry), "POST")

    proxy.close()
    engine.dispose()
    assert_unknown(caplog, caught.value)
    wait_until(lambda: numbers_in(mysql) == [1, 0])
    assert proxy.commits == 1


def test_a_request_without_the_middleware_has_no_notes(postgres_database: Database) -> None:
    """Listening to all engines does no harm to what is not protected."""
    registry = registry_of(postgres_database.engine)
    app = SessionMiddleware(list_app(lambda: add_note(registry)), registry)
    reply = Reply()
    app(make_environ("POST"), reply.start)
    with session_scope(registry):
        add_note(registry)
    with postgres_database.engine.connect() as connection, pytest.raises(DBAPIError):
        connection.execute(text("SELECT nonsense"))
    assert postgres_database.notes() == ["note", "note"]
