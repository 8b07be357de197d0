"""What MariaDB and MySQL say of lost races and broken connections."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError

from tests.retry.applications import flask_app, list_app, protect
from tests.retry.databases import Proxy, assert_unknown, race_of, wait_until
from tests.support.galera import mariadb
from tests.support.wsgi import Server, drive, make_registry
from wsgi_dbsession.retry import Retry, is_retryable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import URL, Engine

pytestmark = pytest.mark.promise("run again")


@pytest.fixture(scope="module")
def mysql_url() -> Iterator[URL]:
    """The server that TEST_MYSQL_URL names, or a MariaDB of the tests' own."""
    if "TEST_MYSQL_URL" in os.environ:
        yield make_url(os.environ["TEST_MYSQL_URL"])
    else:
        with mariadb() as server:
            yield server.url()


@pytest.fixture
def mysql(mysql_url: URL) -> Iterator[Engine]:
    """An engine of that server, with a table of two accounts."""
    # A name for each worker: the database may be the user's.
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
    registry = make_registry(mysql)
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

        replies.append(drive(protect(framework(work), registry), "POST"))

    replies: list[Server] = []
    threads = [threading.Thread(target=client, args=pair) for pair in ((1, 2), (2, 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert [reply.body for reply in replies] == [b"done", b"done"]
    assert len(attempts) == 3
    assert numbers_in(mysql) == [2, 2]


@pytest.mark.parametrize("fails", [True, False], ids=["error page", "called a success"])
def test_a_deadlock_in_a_savepoint_of_mysql_is_not_hidden(fails: bool, mysql: Engine) -> None:
    """The server has ended the transaction, and the savepoint with it.

    So the rollback to the savepoint fails, with error 1305: that is a consequence. An application
    that swallows both would commit half of its work.
    """
    registry = make_registry(mysql)
    meeting = threading.Barrier(2, timeout=60)
    attempts: list[int] = []

    def client(first: int, second: int) -> None:
        def count_both() -> None:
            with registry.begin_nested():
                again = first in attempts
                attempts.append(first)
                # Locks more than the other one, which is the victim then.
                for _ in range(first):
                    registry.execute(count_up(mysql, first))
                if not again:
                    meeting.wait()
                registry.execute(count_up(mysql, second))

        def work() -> None:
            try:
                count_both()
            except DBAPIError as error:
                failure = str(error)
            else:
                return
            # Not in the handler, whose error would be the context of what is raised.
            if fails:
                raise ValueError(failure)
            registry.execute(count_up(mysql, 1))

        replies.append(drive(protect(flask_app(work), registry), "POST"))

    replies: list[Server] = []
    threads = [threading.Thread(target=client, args=pair) for pair in ((1, 2), (2, 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert [reply.body for reply in replies] == [b"done", b"done"]
    assert len(attempts) == 3
    # Those of the one client, and of the other: 1 + 1 and 2 + 1.
    assert numbers_in(mysql) == [2, 3]


def test_another_error_1305_of_mysql_is_a_cause(mysql: Engine) -> None:
    """A procedure that does not exist is a mistake, whatever was before it."""
    registry = make_registry(mysql)
    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        Retry()
        registry.execute(text("CALL nonsense()"))

    assert drive(protect(flask_app(work), registry), "POST").status[:3] == "500"
    assert len(attempts) == 1


def test_a_deadlock_of_mysql_is_seen_without_the_middleware(mysql: Engine) -> None:
    """What the middleware hides is there, and the table knows its code."""
    one, two = str(count_up(mysql, 1)), str(count_up(mysql, 2))
    (error,) = race_of(mysql, one, two, two, one)
    assert is_retryable(error)


def test_a_lock_wait_timeout_of_mysql_is_run_again(mysql: Engine) -> None:
    """MySQL rolls back only the statement, but the request rolls back everything."""
    registry = make_registry(mysql)
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
        assert drive(protect(list_app(work), registry), "POST").body == b"done"
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
    registry = make_registry(mysql)
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
        assert drive(protect(list_app(work), registry), "POST").body == b"done"
    finally:
        raw.close()
    assert len(attempts) == 2
    assert numbers_in(mysql) == [2, 0]


@pytest.mark.parametrize("at", ["between requests", "in mid-transaction"])
def test_a_connection_that_mysql_ended_before_the_commit_is_not_noticed(
    at: str, mysql: Engine
) -> None:
    """PyMySQL finds it dead when it sends the next statement."""
    registry = make_registry(mysql)
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
        drive(protect(list_app(lambda: pids.append(pid())), registry))
        kill(pids[0])

    try:
        assert drive(protect(flask_app(work), registry), "POST").body == b"done"
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
    registry = make_registry(engine)

    with pytest.raises(DBAPIError) as caught:
        drive(protect(list_app(lambda: registry.execute(count_up(mysql, 1))), registry), "POST")

    proxy.close()
    engine.dispose()
    assert_unknown(caplog, caught.value)
    wait_until(lambda: numbers_in(mysql) == [1, 0])
    assert proxy.commits == 1


@pytest.mark.parametrize("late", [True, False], ids=["late", "at checkout"])
def test_autocommit_of_pymysql_is_seen(late: bool, mysql: Engine) -> None:
    """The driver was told to commit by itself, past SQLAlchemy."""
    registry = make_registry(mysql)

    def switch(driver: Any, *_: object) -> None:
        driver.autocommit(True)

    def work() -> None:
        attempts.append(None)
        connection = registry.connection()
        if late:
            switch(connection.connection.driver_connection)
        registry.execute(count_up(mysql, 1))
        raise Retry

    attempts: list[None] = []
    if not late:
        event.listen(mysql, "checkout", switch)
    with pytest.raises(Retry):
        drive(protect(list_app(work), registry), "POST")
    assert len(attempts) == 1
    assert numbers_in(mysql) == [1, 0]
