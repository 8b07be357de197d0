"""Several registries, transactions that PostgreSQL has aborted, interruptions, cleanup."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

import pg8000
import pytest
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError, SQLAlchemyError
from sqlalchemy.orm import Session, scoped_session

from tests.models import Book, Database, Note, make_engine
from tests.wsgi import assert_nothing_left, make_registry
from wsgi_dbsession import session_scope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import FrameType

    from tests.postgres import Admin

    Registry = scoped_session[Session]


class AppError(Exception):
    """The application's error."""


class Kill(BaseException):
    """What ends a greenlet from outside, in the manner of GreenletExit."""


def raise_error(*_: object) -> None:
    raise AppError


def raise_kill(*_: object) -> None:
    raise Kill


@pytest.fixture
def two(
    postgres_database: Database, other_postgres_database: Database
) -> Iterator[tuple[Registry, Registry]]:
    """Two registries over two databases."""
    registries = (
        make_registry(postgres_database.engine),
        make_registry(other_postgres_database.engine),
    )
    yield registries
    assert_nothing_left(*registries)


# -- several registries ---------------------------------------------------------------------------


def test_several_registries_share_the_commit(
    two: tuple[Registry, Registry], postgres_database: Database, other_postgres_database: Database
) -> None:
    """Both are committed."""
    first, second = two
    with session_scope(first, second):
        first.add(Note(text="first"))
        second.add(Note(text="second"))

    assert postgres_database.notes() == ["first"]
    assert other_postgres_database.notes() == ["second"]


@pytest.mark.parametrize("used", [0, 1])
def test_a_registry_that_was_not_used_does_not_matter(
    two: tuple[Registry, Registry],
    postgres_database: Database,
    other_postgres_database: Database,
    used: int,
) -> None:
    """Whether there is a Session or not, the other one is committed."""
    with session_scope(*two):
        two[used].add(Note(text="a"))
    with session_scope(*two):
        two[used].add(Note(text="b"))
        two[1 - used]()

    notes = [postgres_database.notes(), other_postgres_database.notes()]
    assert notes[used] == ["a", "b"]
    assert notes[1 - used] == []


@pytest.mark.parametrize("broken", [0, 1])
def test_a_flush_that_fails_rolls_all_back(
    two: tuple[Registry, Registry],
    postgres_database: Database,
    other_postgres_database: Database,
    broken: int,
) -> None:
    """All are flushed before the first is committed."""
    with pytest.raises(DBAPIError), session_scope(*two):
        two[1 - broken].add(Note(text="a"))
        two[broken].add(Note(text="\0"))  # PostgreSQL has no such text

    assert postgres_database.notes() == []
    assert other_postgres_database.notes() == []


@pytest.mark.parametrize("broken", [0, 1])
def test_a_swallowed_failure_is_found_before_the_first_commit(
    two: tuple[Registry, Registry],
    postgres_database: Database,
    other_postgres_database: Database,
    broken: int,
) -> None:
    """A flush that failed before, and whose error was caught, rolls all back, too."""
    with pytest.raises(PendingRollbackError, match="cannot commit"), session_scope(*two):
        two[1 - broken].add(Note(text="a"))
        two[broken].add(Note(text="\0"))
        with contextlib.suppress(DBAPIError):
            two[broken].flush()

    assert postgres_database.notes() == []
    assert other_postgres_database.notes() == []


def test_a_first_commit_that_fails_rolls_all_back(
    two: tuple[Registry, Registry], postgres_database: Database, other_postgres_database: Database
) -> None:
    """The others have not been committed by then."""
    first, second = two
    with pytest.raises(IntegrityError), session_scope(first, second):
        first.add(Book(author_id=7))
        second.add(Note(text="a"))

    assert other_postgres_database.notes() == []


def test_a_later_commit_that_fails_cannot_take_back_an_earlier_one(
    two: tuple[Registry, Registry], postgres_database: Database, other_postgres_database: Database
) -> None:
    """That is what two-phase commits are for; the failure is not hidden."""
    first, second = two
    with pytest.raises(IntegrityError), session_scope(first, second) as scope:
        first.add(Note(text="a"))
        second.add(Book(author_id=7))

    assert scope.outcome == "rollback"
    assert postgres_database.notes() == ["a"]


# -- two-phase commits ----------------------------------------------------------------------------


@pytest.fixture
def two_phase(
    postgres_database: Database, other_postgres_database: Database
) -> Iterator[tuple[Registry, Registry]]:
    """Two registries with two-phase transactions; none may be left prepared."""
    registries = (
        make_registry(postgres_database.engine, twophase=True),
        make_registry(other_postgres_database.engine, twophase=True),
    )
    yield registries
    assert_nothing_left(*registries)


def write_trace(trace: list[str], **engines: Engine) -> None:
    """Write down what ends transactions, in order."""
    for name, engine in engines.items():
        for what in ("prepare_twophase", "commit", "commit_twophase", "rollback"):
            event.listen(
                engine, what, lambda *_, line=f"{name} {what}": trace.append(line), named=False
            )


def test_two_phase_transactions_are_prepared_before_any_is_committed(
    two_phase: tuple[Registry, Registry],
    postgres_database: Database,
    other_postgres_database: Database,
    tmp_path: Path,
) -> None:
    """Prepare, commit those that have one phase only, commit the prepared ones."""
    trace: list[str] = []
    single = make_registry(make_engine(f"sqlite:///{tmp_path / 'single.db'}"))
    engine = single.session_factory.kw["bind"]
    write_trace(trace, a=postgres_database.engine, b=other_postgres_database.engine, single=engine)
    with session_scope(two_phase[0], single, two_phase[1]):
        two_phase[0].add(Note(text="a"))
        two_phase[1].add(Note(text="b"))
        single.execute(text("CREATE TABLE t (x INTEGER)"))

    assert trace == [
        "a prepare_twophase",
        "b prepare_twophase",
        "single commit",
        "a commit_twophase",
        "b commit_twophase",
    ]
    assert postgres_database.notes() == ["a"]
    assert other_postgres_database.notes() == ["b"]
    engine.dispose()


def test_a_single_two_phase_transaction_is_committed(
    two_phase: tuple[Registry, Registry], postgres_database: Database
) -> None:
    """Alone, SQLAlchemy does it all."""
    with session_scope(*two_phase):
        two_phase[0].add(Note(text="a"))

    assert postgres_database.notes() == ["a"]


def test_savepoints_left_open_are_prepared_with_the_rest(
    two_phase: tuple[Registry, Registry],
    postgres_database: Database,
    other_postgres_database: Database,
) -> None:
    """As a commit does it, though prepare() alone would refuse."""
    with session_scope(*two_phase):
        for registry in two_phase:
            registry.begin_nested()
            registry.begin_nested()
            registry.add(Note(text="a"))

    assert postgres_database.notes() == ["a"]
    assert other_postgres_database.notes() == ["a"]


@pytest.mark.parametrize("broken", [0, 1])
def test_a_prepare_that_fails_rolls_all_back(
    two_phase: tuple[Registry, Registry],
    postgres_database: Database,
    other_postgres_database: Database,
    broken: int,
) -> None:
    """A deferred foreign key fails in PREPARE TRANSACTION; what was prepared is taken back."""
    with pytest.raises(SQLAlchemyError) as caught, session_scope(*two_phase) as scope:
        two_phase[1 - broken].add(Note(text="a"))
        two_phase[broken].add(Book(author_id=7))

    # SQLAlchemy and psycopg let an error of their own cleanup have precedence.
    chain = [caught.value, caught.value.__context__]
    assert any(isinstance(error, IntegrityError) for error in chain)
    assert scope.outcome == "rollback"
    assert postgres_database.notes() == []
    assert other_postgres_database.notes() == []


@pytest.mark.parametrize("kind", ["an error", "an interruption"])
def test_a_one_phase_commit_that_fails_takes_the_prepared_ones_back(
    two_phase: tuple[Registry, Registry],
    postgres_database: Database,
    other_postgres_database: Database,
    sqlite_database: Database,
    kind: str,
) -> None:
    """It comes between prepare and commit; nothing stays prepared, which would keep its locks."""
    single = make_registry(sqlite_database.engine)
    if kind == "an interruption":
        event.listen(single.session_factory, "before_commit", raise_kill)

    with (
        pytest.raises(IntegrityError if kind == "an error" else Kill),
        session_scope(*two_phase, single),
    ):
        for registry in two_phase:
            registry.add(Note(text="a"))
        single.add(Book(author_id=7))

    assert postgres_database.notes() == []
    assert other_postgres_database.notes() == []
    assert_nothing_left(single)


# -- a transaction that PostgreSQL has aborted ----------------------------------------------------

DRIVERS = ["psycopg", "psycopg2", "pg8000"]


@pytest.fixture(params=DRIVERS)
def driver_registry(
    request: pytest.FixtureRequest, postgres_database: Database
) -> Iterator[Registry]:
    """A registry over PostgreSQL, with each of the drivers in turn."""
    engine = make_engine(postgres_database.url.set(drivername=f"postgresql+{request.param}"))
    registry = make_registry(engine)
    yield registry
    assert_nothing_left(registry)
    engine.dispose()


def divide_by_zero(registry: Registry) -> None:
    with contextlib.suppress(DBAPIError):
        registry.execute(text("SELECT 1/0"))


def test_a_swallowed_error_does_not_become_a_success(
    driver_registry: Registry, postgres_database: Database
) -> None:
    """PostgreSQL answers COMMIT with ROLLBACK then, which two of the drivers do not report."""
    with (
        pytest.raises((PendingRollbackError, DBAPIError)) as caught,
        session_scope(driver_registry) as scope,
    ):
        driver_registry.add(Note(text="lost"))
        driver_registry.flush()
        divide_by_zero(driver_registry)

    if driver_registry.session_factory.kw["bind"].driver != "pg8000":  # it raises itself
        assert "with Session.begin_nested()" in str(caught.value)
        assert "Session.rollback()" in str(caught.value)
    assert (scope.outcome, scope.reason) == ("rollback", "commit failed")
    assert postgres_database.notes() == []


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_the_drivers_that_are_asked_need_it(postgres_database: Database, driver: str) -> None:
    """Without the check, SQLAlchemy and the driver report a commit that was none."""
    engine = create_engine(postgres_database.url.set(drivername=f"postgresql+{driver}"))
    with Session(engine) as session:
        session.add(Note(text="lost"))
        session.flush()
        with contextlib.suppress(DBAPIError):
            session.execute(text("SELECT 1/0"))
        session.commit()
    engine.dispose()

    assert postgres_database.notes() == []


def test_a_savepoint_mends_it(driver_registry: Registry, postgres_database: Database) -> None:
    """What the message advises works: the error is confined to the savepoint."""
    with session_scope(driver_registry):
        driver_registry.add(Note(text="kept"))
        with contextlib.suppress(DBAPIError), driver_registry.begin_nested():
            driver_registry.execute(text("SELECT 1/0"))

    assert postgres_database.notes() == ["kept"]


def test_a_rollback_mends_it(driver_registry: Registry, postgres_database: Database) -> None:
    """What the message advises works: what comes after the rollback is committed."""
    with session_scope(driver_registry):
        driver_registry.add(Note(text="lost"))
        divide_by_zero(driver_registry)
        driver_registry.rollback()
        driver_registry.add(Note(text="kept"))

    assert postgres_database.notes() == ["kept"]


def test_a_connection_that_the_application_gave_up_is_not_asked(
    postgres_registry: Registry,
) -> None:
    """An invalidated connection has no transaction that could be aborted."""
    with pytest.raises(PendingRollbackError, match="invalid"), session_scope(postgres_registry):
        postgres_registry.execute(text("SELECT 1"))
        postgres_registry.connection().invalidate()


# -- interruptions --------------------------------------------------------------------------------


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
    """Nobody knows in which of several Sessions a statement was interrupted."""
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


# -- cleanup --------------------------------------------------------------------------------------


def write(*registries: Registry) -> None:
    for registry in registries:
        registry.add(Note(text="lost"))
        registry.flush()


@pytest.mark.parametrize("how", ["doomed", "an error", "a failed commit"])
def test_a_rollback_that_fails_is_logged_and_nothing_is_left(
    two: tuple[Registry, Registry],
    postgres_database: Database,
    other_postgres_database: Database,
    caplog: pytest.LogCaptureFixture,
    how: str,
) -> None:
    """The connection is closed instead, and the other Sessions are rolled back all the same."""
    event.listen(two[0].session_factory, "after_rollback", raise_error)
    expected: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if how != "doomed":
        expected = pytest.raises(ValueError if how == "an error" else IntegrityError)

    with expected, session_scope(*two) as scope:
        write(*two)
        if how == "doomed":
            scope.doom()
        elif how == "an error":
            raise ValueError
        two[0].add(Book(author_id=7))

    assert scope.outcome == "rollback"
    assert_nothing_left(*two)
    assert postgres_database.notes() == other_postgres_database.notes() == []
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("wsgi_dbsession", logging.WARNING)
    assert record.getMessage() == "rollback failed, the connection is closed instead"
    assert record.exc_info is not None
    assert record.exc_info[0] is AppError


@pytest.mark.parametrize("registry_number", [0, 1])
def test_a_close_that_fails_leaves_no_session_in_the_registry(
    two: tuple[Registry, Registry],
    postgres_database: Database,
    caplog: pytest.LogCaptureFixture,
    registry_number: int,
) -> None:
    """scoped_session.remove() would keep it; the work itself is committed."""

    class Broken(Session):
        def close(self) -> None:
            raise AppError

    two[registry_number].session_factory.class_ = Broken
    with session_scope(*two) as scope:
        write(*two)

    assert scope.outcome == "commit"
    assert_nothing_left(*two)
    assert postgres_database.notes() == ["lost"]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_an_interrupted_rollback_propagates(two: tuple[Registry, Registry]) -> None:
    """Where there was no error before it; the other Session is rolled back all the same."""
    event.listen(two[0].session_factory, "after_rollback", raise_kill)
    with pytest.raises(Kill), session_scope(*two) as scope:
        write(*two)
        scope.doom()

    assert scope.outcome == "rollback"
    assert_nothing_left(*two)


def test_the_first_error_beats_an_interrupted_rollback(two: tuple[Registry, Registry]) -> None:
    """The error of the block propagates."""
    event.listen(two[0].session_factory, "after_rollback", raise_kill)
    with pytest.raises(AppError), session_scope(*two):
        write(*two)
        raise AppError

    assert_nothing_left(*two)


@pytest.mark.parametrize("error", [None, AppError], ids=["", "after an error"])
def test_an_interrupted_close_propagates(
    two: tuple[Registry, Registry], error: type[Exception] | None
) -> None:
    """Where there was no error before it; the first interruption, if there are two."""

    class Broken(Session):
        def close(self) -> None:
            raise Kill(self.bind)

    for registry in two:
        registry.session_factory.class_ = Broken

    with pytest.raises(error or Kill) as caught, session_scope(*two):
        write(*two)
        if error is not None:
            raise error

    if error is None:
        assert caught.value.args == (two[0].session_factory.kw["bind"],)
    assert_nothing_left(*two)


def test_a_session_that_cannot_end_loses_its_connection(
    two: tuple[Registry, Registry],
    postgres_database: Database,
    other_postgres_database: Database,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is closed, and with it the database rolls back: it must not stay checked out."""

    class Broken(Session):
        def rollback(self) -> None:
            raise AppError

        def close(self) -> None:
            raise AppError

    two[0].session_factory.class_ = Broken
    with session_scope(*two) as scope:
        write(*two)
        scope.doom()

    assert_nothing_left(*two)
    assert postgres_database.notes() == other_postgres_database.notes() == []
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2


def test_a_connection_that_cannot_be_closed_hinders_nobody(
    two: tuple[Registry, Registry], other_postgres_database: Database
) -> None:
    """Everything fails for one Session, and the other is cleaned up all the same."""

    class Broken(Session):
        def rollback(self) -> None:
            raise AppError

        def invalidate(self) -> None:
            raise AppError

    two[0].session_factory.class_ = Broken
    with session_scope(*two) as scope:
        write(*two)
        scope.doom()

    assert_nothing_left(*two)
    assert other_postgres_database.notes() == []
