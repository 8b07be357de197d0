"""What is made of connections that broke."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import DBAPIError, IllegalStateChangeError

from tests.retry.applications import flask_app, list_app, protect
from tests.retry.databases import (
    Proxy,
    add_note,
    assert_unknown,
    engine_of,
    trigger_at_commit,
    wait_until,
)
from tests.support.wsgi import Server, drive, make_environ, make_registry
from wsgi_dbsession import SessionMiddleware, session_scope
from wsgi_dbsession.retry import is_retryable, run_transaction

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Engine

    from tests.support import postgres
    from tests.support.models import Database


# -- connections that broke -----------------------------------------------------------------------


@pytest.mark.promise("run again")
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
    registry = make_registry(engine)
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

    reply = drive(protect(framework(work), registry), "POST")

    assert (reply.status, reply.body, len(attempts)) == ("200 OK", b"done", 2)
    assert postgres_database.notes() == ["note"]


@pytest.mark.parametrize("commits", [True, False], ids=["commits", "leaves it"])
def test_a_lost_connection_that_was_called_a_success_is_run_again(
    commits: bool, engine: Engine, postgres_admin: postgres.Admin, postgres_database: Database
) -> None:
    """There is nothing to commit, and no COMMIT is sent."""
    registry = make_registry(engine)
    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        add_note(registry)
        if len(attempts) == 1:
            postgres_admin.terminate()
            with contextlib.suppress(DBAPIError):
                registry.execute(text("SELECT 1"))
        if commits:
            registry.commit()

    assert drive(protect(list_app(work), registry), "POST").body == b"done"
    assert len(attempts) == 2
    assert postgres_database.notes() == ["note"]


def test_a_stale_connection_is_seen_without_the_middleware(
    engine: Engine, postgres_admin: postgres.Admin
) -> None:
    """What the middleware hides is there: without it the client gets a 500."""
    registry = make_registry(engine)
    with engine.connect():
        pass
    postgres_admin.terminate()

    app = protect(flask_app(lambda: add_note(registry)), registry, attempts=1)

    assert drive(app, "POST").status[:3] == "500"


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


@pytest.mark.promise("never again")
@pytest.mark.parametrize("framework", [list_app, flask_app], ids=["raised", "error page"])
def test_an_outcome_that_is_unknown_is_never_run_again(
    framework: Any,
    proxy: Proxy,
    proxied: Engine,
    postgres_database: Database,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The answer to the COMMIT is lost: it took place, and the client cannot know."""
    registry = make_registry(proxied)
    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        add_note(registry)
        if framework is flask_app:
            registry.commit()  # what the framework swallows

    app = protect(framework(work), registry)
    if framework is list_app:
        with pytest.raises(DBAPIError) as caught:
            drive(app, "POST")
        assert_unknown(caplog, caught.value)
        assert not is_retryable(caught.value)
    else:
        assert drive(app, "POST").status[:3] == "500"

    assert (len(attempts), proxy.commits) == (1, 1)
    wait_until(postgres_database.notes)
    assert postgres_database.notes() == ["note"]


@pytest.mark.promise("never again", "jobs")
def test_a_job_whose_outcome_is_unknown_is_never_run_again(
    proxy: Proxy,
    proxied: Engine,
    postgres_database: Database,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The same for ``run_transaction``."""
    registry = make_registry(proxied)

    def job() -> None:
        add_note(registry)

    with pytest.raises(DBAPIError) as caught:
        run_transaction(job, registry, backoff=0)

    assert_unknown(caplog, caught.value, f"{job.__qualname__}()")
    assert proxy.commits == 1
    wait_until(postgres_database.notes)


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


@pytest.mark.promise("never again")
def test_a_connection_that_was_ended_during_commit_is_never_run_again(
    engine: Engine,
    postgres_admin: postgres.Admin,
    postgres_database: Database,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """``pg_terminate_backend`` hits a COMMIT: it did not take place, but no client can know."""
    registry = make_registry(engine)
    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        registry.execute(text("INSERT INTO author (name) VALUES ('somebody')"))

    errors: list[BaseException] = []

    def request() -> None:
        try:
            drive(protect(list_app(work), registry), "POST")
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


@pytest.mark.promise("never again")
@pytest.mark.parametrize("code", ["40003", "08006", "57P01"])
def test_an_answer_to_commit_that_leaves_it_open_is_never_run_again(
    code: str, engine: Engine, postgres_database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """CockroachDB's 40003, a lost connection, an operator: the server itself does not promise."""
    registry = make_registry(engine)
    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        registry.execute(text("INSERT INTO author (name) VALUES ('somebody')"))

    with (
        trigger_at_commit(postgres_database, f"RAISE SQLSTATE '{code}'"),
        pytest.raises(DBAPIError) as caught,
    ):
        drive(protect(list_app(work), registry), "POST")
    assert len(attempts) == 1
    assert_unknown(caplog, caught.value)

    with (
        trigger_at_commit(postgres_database, "RAISE SQLSTATE '40001'"),
        pytest.raises(DBAPIError),
    ):
        drive(protect(list_app(work), registry), "POST")
    assert len(attempts) == 4


class Interruption(BaseException):
    """As a ``gevent.Timeout`` or a ``GreenletExit`` is one."""


def test_a_commit_that_was_interrupted_is_told(
    postgres_admin: postgres.Admin,
    postgres_database: Database,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A timeout that hits a COMMIT is not run again either, and the outcome is unknown."""
    registry = make_registry(postgres_database.engine)
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
                drive(protect(list_app(work), registry), "POST")
            thread.join(60)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert any("unknown" in message for message in caplog.messages)


def test_a_rollback_that_fails_does_not_hide_the_cause(
    engine: Engine, postgres_admin: postgres.Admin, postgres_database: Database
) -> None:
    """The race was lost before the connection, so the request is run again."""
    registry = make_registry(engine)
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

    assert drive(protect(flask_app(work), registry), "POST").body == b"done"
    assert (len(attempts), postgres_database.notes()) == (2, ["note"])


@pytest.mark.promise("never again")
def test_a_connection_that_was_ended_between_the_phases_is_never_run_again(
    engine: Engine,
    postgres_database: Database,
    other_postgres_database: Database,
    postgres_admin: postgres.Admin,
) -> None:
    """A transaction that may have been prepared is in doubt: somebody may still commit it."""
    one = make_registry(other_postgres_database.engine, twophase=True)
    two = make_registry(engine, twophase=True)
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
        drive(protect(list_app(work), one, two), "POST")

    assert len(attempts) == 1
    assert postgres_database.notes() == other_postgres_database.notes() == []


@pytest.mark.promise("never again")
@pytest.mark.parametrize("statement", ["PREPARE TRANSACTION 'mine'", " commit", "END"])
def test_a_connection_that_broke_in_a_statement_that_commits_is_never_run_again(
    statement: str,
    engine: Engine,
    postgres_admin: postgres.Admin,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Some drivers, and applications, send the phases as statements."""
    registry = make_registry(engine)
    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        add_note(registry)
        postgres_admin.terminate()
        registry.execute(text(statement))

    with pytest.raises(DBAPIError) as caught:
        drive(protect(list_app(work), registry), "POST")

    assert len(attempts) == 1
    assert_unknown(caplog, caught.value)


def test_a_request_without_the_middleware_has_no_notes(postgres_database: Database) -> None:
    """Listening to all engines does no harm to what is not protected."""
    registry = make_registry(postgres_database.engine)
    app = SessionMiddleware(list_app(lambda: add_note(registry)), registry)
    server = Server()
    app(make_environ("POST"), server.start_response)
    with session_scope(registry):
        add_note(registry)
    with postgres_database.engine.connect() as connection, pytest.raises(DBAPIError):
        connection.execute(text("SELECT nonsense"))
    assert postgres_database.notes() == ["note", "note"]


def test_a_server_that_is_down_is_not_waited_for(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """A refused connection is no lost race, unless the application says so."""
    down = create_engine(engine.url.set(port=postgres_free_port()))
    registry = make_registry(down)
    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        add_note(registry)

    def is_refused(error: BaseException) -> bool:
        return isinstance(error, DBAPIError) and error.statement is None

    assert drive(protect(flask_app(work), registry), "POST").status[:3] == "500"
    assert len(attempts) == 1
    app = protect(flask_app(work), registry, on=is_refused)
    assert drive(app, "POST").status[:3] == "500"
    assert len(attempts) == 4


def postgres_free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
