"""An interrupted connection does not come back."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

import pg8000
import pytest
from sqlalchemy import Engine, String, TypeDecorator, bindparam, select, text
from sqlalchemy.exc import StatementError
from sqlalchemy.orm import Session, scoped_session

from tests.support.errors import AppError, Kill
from tests.support.wsgi import assert_nothing_left
from wsgi_dbsession import session_scope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from tests.support.models import Database
    from tests.support.postgres import Admin

    Registry = scoped_session[Session]

pytestmark = pytest.mark.promise("interruptions")

LOCK = "SELECT 'secret' FROM pg_advisory_xact_lock(1)"


@contextlib.contextmanager
def interrupt_while_waiting(database: Database, admin: Admin) -> Iterator[None]:
    """Raise Kill in the main thread while it waits for LOCK, as a hub does it in a greenlet."""

    def handler(number: int, frame: FrameType | None) -> None:
        raise Kill

    def wait_and_interrupt() -> None:
        deadline = time.monotonic() + 20
        while not any(each.query == LOCK for each in admin.activity("active")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handler)
    thread = threading.Thread(target=wait_and_interrupt)
    with database.observer.connect() as owner:
        owner.execute(text(LOCK))
        thread.start()
        try:
            yield
        except Kill as kill:
            # Or the socket lives until a collection, which complains of it.
            traceback.clear_frames(kill.__traceback__)
            raise
        finally:
            thread.join()
            signal.signal(signal.SIGUSR1, before)


def by_session(session: Session) -> None:
    session.execute(text(LOCK))


def by_driver(session: Session) -> None:
    cursor = session.connection().connection.cursor()
    cursor.execute(LOCK)


def next_answer(engine: Engine) -> str:
    """Return what the next user of the pool reads in answer to a question of its own."""
    with engine.connect() as connection:
        cursor: Any = connection.connection.cursor()
        cursor.execute("SELECT 'mine'")
        answer: str = cursor.fetchone()[0]
        return answer


@pytest.mark.parametrize("driver_registry", ["pg8000"], indirect=True)
def test_a_rollback_is_not_enough_after_an_interruption(
    driver_registry: Registry, postgres_database: Database, postgres_admin: Admin
) -> None:
    """Why a Session is invalidated: its connection would come back to the pool out of step.

    SQLAlchemy itself gives up a connection on which it saw a statement interrupted. It does not
    see what the application does with a cursor of the driver: then the answer to that statement
    is taken for the one to ROLLBACK, and so on with everybody who gets the connection.
    """
    engine: Engine = driver_registry.session_factory.kw["bind"]
    with Session(engine) as session:
        with pytest.raises(Kill), interrupt_while_waiting(postgres_database, postgres_admin):
            by_driver(session)
        session.rollback()

    for _ in range(2):
        with pytest.raises(pg8000.Error):
            next_answer(engine)


@pytest.mark.parametrize("driver_registry", ["psycopg", "pg8000"], indirect=True)
@pytest.mark.parametrize("execute", [by_session, by_driver])
def test_an_interrupted_connection_does_not_come_back(
    driver_registry: Registry,
    postgres_database: Database,
    postgres_admin: Admin,
    caplog: pytest.LogCaptureFixture,
    execute: Callable[[Session], None],
) -> None:
    """A greenlet that is killed in mid-statement costs its connection, and nothing else."""
    with (
        pytest.raises(Kill),
        interrupt_while_waiting(postgres_database, postgres_admin),
        session_scope(driver_registry) as scope,
    ):
        execute(driver_registry())

    assert scope.outcome == "rollback"
    assert_nothing_left(driver_registry)
    assert next_answer(driver_registry.session_factory.kw["bind"]) == "mine"
    assert caplog.records == []


def test_the_others_are_given_up_with_the_interrupted_one(
    two: tuple[Registry, Registry], postgres_admin: Admin
) -> None:
    """It is unknown in which of several Sessions a statement was interrupted."""
    first, second = two
    with pytest.raises(Kill), session_scope(first, second):
        for registry in two:
            registry.execute(text("SELECT 1"))
        raise Kill

    for registry in two:
        pool: Any = registry.session_factory.kw["bind"].pool
        assert pool.checkedout() == 0
    postgres_admin.wait_for(0)


def test_an_error_does_not_cost_a_connection(
    postgres_registry: Registry, postgres_admin: Admin
) -> None:
    """After an ordinary one the connection is rolled back, and used again."""
    with pytest.raises(AppError), session_scope(postgres_registry):
        pid = postgres_registry.scalar(text("SELECT pg_backend_pid()"))
        raise AppError

    with session_scope(postgres_registry):
        assert postgres_registry.scalar(text("SELECT pg_backend_pid()")) == pid


def test_an_error_raised_into_the_driver_costs_that_connection(
    postgres_registry: Registry, postgres_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a ``gevent.Timeout(s, AnExceptionClass)``. The pool keeps the others."""
    engine = postgres_database.engine
    before = pids(engine)

    def do_execute(*_: object) -> None:
        monkeypatch.undo()
        raise AppError

    with session_scope(postgres_registry):
        connection = postgres_registry.connection()
        monkeypatch.setattr(engine.dialect, "do_execute", do_execute)
        with pytest.raises(AppError):
            connection.execute(text("SELECT 1"))
        assert connection.invalidated
        postgres_registry.rollback()

    assert len(before & pids(engine)) == 1


def test_an_error_before_the_driver_costs_nothing(postgres_database: Database) -> None:
    """Such as one of the type of a parameter."""

    class Failing(TypeDecorator[str]):
        impl = String
        cache_ok = True

        def process_bind_param(self, value: object, dialect: object) -> str:
            raise AppError

    with postgres_database.engine.connect() as connection:
        with pytest.raises(StatementError):
            connection.execute(select(bindparam("x", "a", type_=Failing)))
        assert not connection.invalidated


def pids(engine: Engine) -> set[int]:
    """Return the server's processes of two connections at a time."""
    statement = text("SELECT pg_backend_pid()")
    with engine.connect() as first, engine.connect() as second:
        return {first.scalars(statement).one(), second.scalars(statement).one()}
