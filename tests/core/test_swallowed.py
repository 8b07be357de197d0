"""Errors that the application, or a listener, swallows do not end in a success."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.exc import (
    DBAPIError,
    IntegrityError,
    OperationalError,
    PendingRollbackError,
    SQLAlchemyError,
)

from tests.core.discards import DISCARDS
from tests.support.errors import AppError
from tests.support.galera import mariadb
from tests.support.models import Database, Note, make_engine, without_autocommit
from tests.support.wsgi import ask, make_environ, make_registry
from wsgi_dbsession import SessionMiddleware, _driver, _spoiled, current_scope, session_scope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from sqlalchemy import URL
    from sqlalchemy.orm import Session, scoped_session

    Registry = scoped_session[Session]

pytestmark = pytest.mark.promise("no silent loss", "aborted")


def fail(session: Session) -> None:
    with contextlib.suppress(DBAPIError):
        session.execute(text("SELECT 1/0"))


# -- PostgreSQL -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["after_flush", "after_flush_postexec", "before_commit"])
def test_a_listener_may_swallow_the_error(
    driver_registry: Registry, postgres_database: Database, name: str
) -> None:
    """It runs in the flush, or in the commit itself, after the last question."""
    event.listen(driver_registry.session_factory, name, lambda session, *_: fail(session))

    with (
        pytest.raises((PendingRollbackError, DBAPIError)),
        session_scope(driver_registry) as scope,
    ):
        driver_registry.add(Note(text="lost"))

    assert (scope.outcome, scope.reason) == ("rollback", "rolled back")
    assert postgres_database.notes() == []


def test_a_listener_of_the_mapper_may_swallow_the_error(
    postgres_registry: Registry, postgres_database: Database
) -> None:
    """Such as one that writes an audit row beside each insert."""

    def audit(_: object, connection: Any, __: object) -> None:
        with contextlib.suppress(DBAPIError):
            connection.execute(text("INSERT INTO audit VALUES (1)"))

    event.listen(Note, "after_insert", audit)
    try:
        with pytest.raises(PendingRollbackError), session_scope(postgres_registry):
            postgres_registry.add(Note(text="lost"))
    finally:
        event.remove(Note, "after_insert", audit)

    assert postgres_database.notes() == []


def test_an_error_that_a_savepoint_took_back_is_none(
    postgres_registry: Registry, postgres_database: Database
) -> None:
    """In a listener of the commit, too."""

    def try_it(session: Session) -> None:
        if not session.in_nested_transaction():
            with contextlib.suppress(DBAPIError), session.begin_nested():
                session.execute(text("SELECT 1/0"))

    event.listen(postgres_registry.session_factory, "before_commit", try_it)

    with session_scope(postgres_registry):
        postgres_registry.add(Note(text="kept"))

    assert postgres_database.notes() == ["kept"]


def test_both_phases_are_asked(
    postgres_database: Database, other_postgres_database: Database
) -> None:
    """PostgreSQL answers PREPARE of an aborted transaction with ROLLBACK, too."""
    first = make_registry(postgres_database.engine, twophase=True)
    second = make_registry(other_postgres_database.engine, twophase=True)
    event.listen(second.session_factory, "before_commit", fail)

    # The first SQLAlchemy 2.0 hides the error: it refuses its own rollback.
    with pytest.raises(SQLAlchemyError), session_scope(first, second):
        first.add(Note(text="lost"))
        second.add(Note(text="lost"))

    assert postgres_database.notes() == other_postgres_database.notes() == []


def test_the_driver_is_asked_and_not_the_name_of_the_dialect(postgres_database: Database) -> None:
    """What speaks PostgreSQL's protocol behaves the same, whatever it is called."""
    engine = make_engine(postgres_database.url)
    engine.dialect.name = "cockroachdb"
    registry = make_registry(engine)

    with pytest.raises(PendingRollbackError), session_scope(registry):
        registry.add(Note(text="lost"))
        registry.flush()
        fail(registry())

    assert postgres_database.notes() == []
    engine.dispose()


# -- SQLite ---------------------------------------------------------------------------------------


@pytest.fixture(params=["BEGIN recipe", "legacy transactions", "autocommit=False"])
def unique(request: pytest.FixtureRequest, sqlite_database: Database) -> Iterator[Registry]:
    """A registry over SQLite, where the note 1 is there already."""
    engine: Engine = sqlite_database.engine
    if request.param == "legacy transactions":
        engine = create_engine(sqlite_database.url)
    elif request.param == "autocommit=False":
        engine = without_autocommit(sqlite_database.url)
    with sqlite_database.observer.begin() as connection:
        connection.execute(text("INSERT INTO note VALUES (1, 'there')"))
    yield make_registry(engine)
    engine.dispose()


def insert_or_rollback(registry: Registry) -> None:
    with pytest.raises(IntegrityError):
        registry.execute(text("INSERT OR ROLLBACK INTO note VALUES (1, 'again')"))


def test_sqlite_may_end_the_transaction(unique: Registry, sqlite_database: Database) -> None:
    """What was written before is gone, and a commit would keep the other half."""
    with (
        pytest.raises(PendingRollbackError, match="UNIQUE constraint failed"),
        session_scope(unique),
    ):
        unique.execute(text("INSERT INTO note (text) VALUES ('lost')"))
        insert_or_rollback(unique)

    assert sqlite_database.notes() == ["there"]


def test_a_connection_in_the_pool_keeps_nothing_of_it(
    unique: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    """An error refers to the frames that it passed, and those to all that they used."""
    for name in ("wsgi_dbsession", "sqlalchemy"):
        caplog.set_level("CRITICAL", name)  # pytest would keep the records

    class Big:
        pass

    seen: list[weakref.ref[Big]] = []

    def work() -> None:
        big = Big()
        seen.append(weakref.ref(big))
        unique.execute(text("INSERT INTO note (text) VALUES ('lost')"))
        with contextlib.suppress(IntegrityError):
            unique.execute(text("INSERT OR ROLLBACK INTO note VALUES (1, 'again')"))

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        work()
        start_response("200 OK", [])
        return []

    with pytest.raises(PendingRollbackError):
        SessionMiddleware(app, unique)(make_environ("POST"), lambda *_: print)
    gc.collect()

    assert [ref() for ref in seen] == [None]


def test_what_follows_the_end_of_the_transaction_goes_with_it(
    unique: Registry, sqlite_database: Database
) -> None:
    """Not each way to have transactions begins another one by itself."""
    with pytest.raises(PendingRollbackError), session_scope(unique):
        unique.execute(text("INSERT INTO note (text) VALUES ('lost')"))
        insert_or_rollback(unique)
        unique.execute(text("INSERT INTO note (text) VALUES ('lost, too')"))
    with pytest.raises(AppError), session_scope(unique):
        insert_or_rollback(unique)
        unique.execute(text("INSERT INTO note (text) VALUES ('lost as well')"))
        raise AppError

    assert sqlite_database.notes() == ["there"]


def test_an_error_that_leaves_the_transaction_open_is_none(
    unique: Registry, sqlite_database: Database
) -> None:
    """SQLite takes back the statement alone."""
    with session_scope(unique):
        unique.execute(text("INSERT INTO note (text) VALUES ('kept')"))
        with pytest.raises(IntegrityError):
            unique.execute(text("INSERT INTO note VALUES (1, 'again')"))

    assert sqlite_database.notes() == ["kept", "there"]


def test_a_connection_of_the_application_goes_on_after_its_rollback(
    unique: Registry, sqlite_database: Database
) -> None:
    """The error belongs to the transaction, and not to the connection."""
    engine = unique.session_factory.kw["bind"]
    with session_scope(unique), engine.connect() as connection:
        connection.execute(text("INSERT INTO note (text) VALUES ('lost')"))
        with pytest.raises(IntegrityError):
            connection.execute(text("INSERT OR ROLLBACK INTO note VALUES (1, 'again')"))
        connection.rollback()
        connection.execute(text("INSERT INTO note (text) VALUES ('kept')"))
        connection.commit()

    assert sqlite_database.notes() == ["kept", "there"]


def test_where_nothing_was_written_nothing_is_lost(
    unique: Registry, sqlite_database: Database
) -> None:
    """The first statement of the transaction: what comes after it is all there is."""
    with session_scope(unique):
        insert_or_rollback(unique)
        unique.execute(text("INSERT INTO note (text) VALUES ('kept')"))

    assert sqlite_database.notes() == ["kept", "there"]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"isolation_level": "AUTOCOMMIT"}, id="AUTOCOMMIT"),
        pytest.param({"connect_args": {"isolation_level": None}}, id="isolation_level=None"),
    ],
)
def test_where_each_statement_commits_an_error_spoils_nothing(
    options: dict[str, Any], sqlite_database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """The application catches it and goes on, as one that looks before it leaps."""
    engine = create_engine(sqlite_database.url, **options)
    registry = make_registry(engine)
    caplog.set_level("INFO")

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        registry.execute(text("INSERT INTO note VALUES (1, 'kept')"))
        insert_or_rollback(registry)
        start_response(environ["PATH_INFO"].strip("/"), [])
        return []

    assert ask(SessionMiddleware(app, registry), path="/201 Created").status == "201 Created"
    with sqlite_database.observer.begin() as connection:
        connection.execute(text("DELETE FROM note"))
    ask(SessionMiddleware(app, registry), "POST", "/404 Not Found")

    assert "except what AUTOCOMMIT has committed" in caplog.text
    assert sqlite_database.notes() == ["kept"]
    engine.dispose()


# -- MariaDB --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[0, 1], ids=["time-out", "time-out rolls back"])
def mariadb_url(request: pytest.FixtureRequest) -> Iterator[URL]:
    """A server with each way to treat a lock that is waited for too long."""
    with mariadb(f"--innodb-rollback-on-timeout={request.param}") as server:
        yield server.url().update_query_dict({"rolls_back": str(request.param)})


@pytest.fixture
def accounts(mariadb_url: URL) -> Iterator[Engine]:
    """Two accounts."""
    engine = create_engine(mariadb_url.difference_update_query(["rolls_back"]))
    with engine.begin() as connection:
        connection.execute(text("CREATE OR REPLACE TABLE account (id INT PRIMARY KEY, n INT)"))
        connection.execute(text("INSERT INTO account VALUES (1, 0), (2, 0), (3, 0)"))
    yield engine
    engine.dispose()


def numbers(engine: Engine) -> list[int]:
    with engine.connect() as connection:
        return list(connection.scalars(text("SELECT n FROM account ORDER BY id")))


def count_up(number: int) -> Any:
    return text(f"UPDATE account SET n = n + 1 WHERE id = {number}")


def lose_a_race(registry: Registry, engine: Engine) -> None:
    """Be the one of two crosswise transactions that MariaDB rolls back."""
    ready, go_on = threading.Event(), threading.Event()

    def other() -> None:
        with engine.begin() as connection:
            # The one with fewer changes is the victim.
            for _ in range(3):
                connection.execute(count_up(2))
            connection.execute(text("UPDATE account SET n = n + 7 WHERE id = 3"))
            ready.set()
            go_on.wait(20)
            connection.execute(count_up(1))

    thread = threading.Thread(target=other)
    thread.start()
    ready.wait(20)
    try:
        go_on.set()
        registry.execute(count_up(2))
    finally:
        thread.join(20)


@pytest.mark.parametrize("savepoint", [False, True], ids=["plain", "in a savepoint"])
def test_a_swallowed_deadlock_of_mariadb_is_refused(accounts: Engine, savepoint: bool) -> None:
    """It has rolled back the whole transaction, and begun another one with the next statement."""
    registry = make_registry(accounts)

    with pytest.raises(PendingRollbackError, match="1213"), session_scope(registry):
        registry.execute(count_up(1))
        block: Any = registry.begin_nested() if savepoint else contextlib.nullcontext()
        with contextlib.suppress(OperationalError), block:
            lose_a_race(registry, accounts)
        registry.execute(count_up(3))

    assert numbers(accounts) == [1, 3, 7]


@pytest.mark.parametrize("savepoint", [False, True], ids=["plain", "in a savepoint"])
def test_a_swallowed_change_of_a_row_that_was_read_is_refused(
    accounts: Engine, savepoint: bool
) -> None:
    """MariaDB rolls back the transaction, by default from 11.6.2 on; the soak test found it."""
    registry = make_registry(accounts)

    with pytest.raises(PendingRollbackError, match="1020"), session_scope(registry):
        registry.execute(text("SET SESSION innodb_snapshot_isolation = ON"))
        registry.scalar(text("SELECT n FROM account WHERE id = 3"))
        with accounts.begin() as other:
            other.execute(count_up(2))
        registry.execute(count_up(1))
        block: Any = registry.begin_nested() if savepoint else contextlib.nullcontext()
        with contextlib.suppress(OperationalError), block:
            registry.execute(count_up(2))
        registry.execute(count_up(3))

    assert numbers(accounts) == [0, 1, 0]


def test_a_swallowed_lack_of_room_for_locks_is_refused(accounts: Engine) -> None:
    """InnoDB rolls back the transaction with it; here it is only signalled."""
    registry = make_registry(accounts)

    with pytest.raises(PendingRollbackError, match="1206"), session_scope(registry):
        registry.execute(count_up(1))
        with pytest.raises(DBAPIError):
            registry.execute(text("SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = 1206"))

    assert numbers(accounts) == [0, 0, 0]


def test_a_time_out_is_refused_where_it_rolls_back(mariadb_url: URL, accounts: Engine) -> None:
    """With ``innodb_rollback_on_timeout``; else only the statement is undone."""
    rolls_back = mariadb_url.query["rolls_back"] == "1"
    registry = make_registry(accounts)
    refused: Any = pytest.raises(PendingRollbackError, match="1205")
    with accounts.connect() as blocker:
        blocker.execute(count_up(2))
        with refused if rolls_back else contextlib.nullcontext(), session_scope(registry):
            registry.execute(text("SET SESSION innodb_lock_wait_timeout = 1"))
            registry.execute(count_up(1))
            with pytest.raises(OperationalError, match="1205"):
                registry.execute(count_up(2))
            registry.execute(count_up(3))
        blocker.rollback()

    assert numbers(accounts) == ([0, 0, 0] if rolls_back else [1, 0, 1])


@pytest.mark.parametrize("discard", DISCARDS.values(), ids=DISCARDS)
def test_a_discarded_write_to_mariadb_is_refused(
    accounts: Engine, discard: Callable[[Registry], None]
) -> None:
    """InnoDB is asked whether the transaction has something to undo."""
    registry = make_registry(accounts)

    with pytest.raises(RuntimeError, match="what it had written is lost"), session_scope(registry):
        registry.execute(count_up(1))
        discard(registry)

    assert numbers(accounts) == [0, 0, 0]


def test_a_discarded_write_to_mariadb_is_refused_among_others(accounts: Engine) -> None:
    """InnoDB lists the youngest transaction first."""
    registry = make_registry(accounts)

    with accounts.connect() as older, accounts.connect() as younger:
        older.execute(count_up(2))
        with pytest.raises(RuntimeError, match="is lost"), session_scope(registry):
            registry.execute(count_up(1))
            younger.execute(count_up(3))
            registry.remove()
        older.rollback()
        younger.rollback()

    assert numbers(accounts) == [0, 0, 0]


def test_a_read_from_mariadb_may_be_discarded(
    accounts: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """Even right after a write of the same connection, and while another one writes."""
    registry = make_registry(accounts)

    with accounts.connect() as other:
        other.execute(count_up(2))
        for _ in range(10):
            with session_scope(registry):
                registry.execute(count_up(1))
            with session_scope(registry) as scope:
                registry.scalar(text("SELECT n FROM account WHERE id = 1 FOR UPDATE"))
                registry.remove()
            assert scope.outcome == "commit"
        other.rollback()

    assert caplog.records == []
    assert numbers(accounts) == [10, 0, 0]


def test_a_discarded_write_is_refused_however_often_the_server_is_asked(accounts: Engine) -> None:
    """One discard after the other, as under load, and each right after its write."""
    registry = make_registry(accounts)

    for _ in range(10):
        with pytest.raises(RuntimeError, match="is lost"), session_scope(registry):
            registry.scalar(text("SELECT n FROM account WHERE id = 1"))
            registry.execute(count_up(1))
            registry.remove()

    assert numbers(accounts) == [0, 0, 0]


def test_a_transaction_that_the_server_does_not_list_is_unknown(
    accounts: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """InnoDB cuts its report after a megabyte, which a test cannot fill."""
    monkeypatch.setattr(_driver, "_INNODB", "SELECT 'LIST OF TRANSACTIONS, truncated'")
    registry = make_registry(accounts)

    with session_scope(registry):
        registry.execute(count_up(1))
        registry.remove()

    assert "closed a Session in an open transaction" in caplog.text


def test_without_the_privilege_it_cannot_be_known(
    accounts: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """MariaDB shows its transactions to those only who have the privilege PROCESS."""
    with accounts.begin() as connection:
        connection.execute(text("CREATE OR REPLACE USER app@'127.0.0.1' IDENTIFIED BY 'app'"))
        connection.execute(text("GRANT ALL ON test.* TO app@'127.0.0.1'"))
    engine = create_engine(accounts.url.set(username="app", password="app", host="127.0.0.1"))
    registry = make_registry(engine)

    with session_scope(registry):
        registry.execute(count_up(1))
        registry.remove()

    assert "closed a Session in an open transaction" in caplog.text
    assert numbers(accounts) == [0, 0, 0]
    engine.dispose()


# -- a registry that was not passed ---------------------------------------------------------------


def test_a_registry_that_was_not_adopted_is_refused_at_its_first_use(
    sqlite_registry: Registry, sqlite_database: Database
) -> None:
    """Nothing would commit or close its Sessions; today's error names the fix."""
    forgotten = make_registry(sqlite_database.engine)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        forgotten.add(Note(text="lost"))
        start_response("201 Created", [])
        return []

    protected = SessionMiddleware(app, sqlite_registry)
    replies = [ask(protected, "POST") for _ in range(20)]

    assert {reply.status for reply in replies} == {"500 Internal Server Error"}
    for reply in replies:
        (error,) = reply.errors
        assert "pass the scoped_session to SessionMiddleware(app, Session)" in str(error)
    pool: Any = sqlite_database.engine.pool
    assert pool.checkedout() == 0


def test_a_registry_that_another_middleware_was_given_shares_the_outcome(
    sqlite_registry: Registry, sqlite_database: Database
) -> None:
    """Once it is adopted, it does not matter by which middleware or block."""
    other = make_registry(sqlite_database.engine)
    session_scope(other)

    with pytest.raises(ZeroDivisionError), session_scope(sqlite_registry):
        other.add(Note(text="lost"))
        other.flush()
        assert current_scope().sessions
        raise ZeroDivisionError
    with session_scope(sqlite_registry):
        other.add(Note(text="kept"))

    assert sqlite_database.notes() == ["kept"]


def test_a_transaction_that_could_not_begin_has_lost_nothing(
    sqlite_database: Database,
) -> None:
    """``BEGIN IMMEDIATE`` waits for who else writes, and the application may try again."""
    engine = create_engine(sqlite_database.url, connect_args={"timeout": 0})
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    registry = make_registry(engine)

    with session_scope(registry) as scope:
        with engine.begin(), pytest.raises(OperationalError, match="locked"):
            registry.connection()
        registry.add(Note(text="a"))

    assert scope.outcome == "commit"
    assert sqlite_database.notes() == ["a"]
    engine.dispose()


@pytest.mark.parametrize("give_up", ["invalidate", "close"])
def test_a_listener_of_the_error_may_give_the_connection_up(
    sqlite_registry: Registry, give_up: str
) -> None:
    """It was registered before the package was imported, so it is called before."""

    def on_error(context: Any) -> None:
        getattr(context.connection, give_up)()

    event.remove(Engine, "handle_error", _spoiled._on_error)
    event.listen(Engine, "handle_error", on_error)
    event.listen(Engine, "handle_error", _spoiled._on_error)
    try:
        with pytest.raises(DBAPIError, match="syntax error"), session_scope(sqlite_registry):
            sqlite_registry.execute(text("SELEC"))
    finally:
        event.remove(Engine, "handle_error", on_error)
