"""Each commit of an attempt is seen, whoever sends it; and nothing else is taken for one."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import sqlite3
import weakref
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Engine, create_engine, event, select, text
from sqlalchemy.exc import DBAPIError, DisconnectionError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from tests.retry.applications import Restless, flask_app, list_app, protect
from tests.support.models import Note, make_engine
from tests.support.proxy import Proxy
from tests.support.wsgi import drive, make_registry
from wsgi_dbsession.replica import Replicas, read_only_engine
from wsgi_dbsession.retry import Retry
from wsgi_dbsession.testing import isolate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Connection
    from sqlalchemy.orm import scoped_session

    from tests.support.models import Database

pytestmark = pytest.mark.promise("never again")

INSERT = text("INSERT INTO note (text) VALUES ('kept')")


@pytest.fixture
def registry(postgres_database: Database) -> Iterator[scoped_session[Session]]:
    """A registry whose pool has one connection, so that it comes back to whoever asks next."""
    engine = make_engine(postgres_database.url, pool_size=1)
    yield make_registry(engine)
    engine.dispose()


def run(registry: scoped_session[Session], before: Callable[[], object], **more: Any) -> int:
    """Run a request that fails with ``Retry`` each time, and return the number of attempts."""
    work = Restless(before)
    with pytest.raises(Retry):
        drive(protect(list_app(work), registry, **more), "POST")
    return work.attempts


def insert_and_commit(registry: scoped_session[Session]) -> None:
    registry.execute(INSERT)
    registry.commit()


def engine_of(registry: scoped_session[Session]) -> Any:
    return registry.session_factory.kw["bind"]


# -- without a Session ----------------------------------------------------------------------------


def test_a_commit_by_the_engine_counts_though_a_session_gets_its_connection(
    registry: scoped_session[Session], postgres_database: Database
) -> None:
    """The pool gives the same connection to the Session, which commits nothing."""

    def work() -> None:
        with engine_of(registry).begin() as connection:
            connection.execute(INSERT)
        registry.execute(text("SELECT 1"))

    assert run(registry, work) == 1
    assert postgres_database.notes() == ["kept"]


def read_by_connection(engine: Engine) -> None:
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))


def commit_by_driver(engine: Engine) -> None:
    raw = engine.raw_connection()
    raw.cursor().execute(INSERT.text)
    raw.commit()
    raw.close()


def commit_by_connections_driver(engine: Engine) -> None:
    with engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        driver.execute(INSERT.text)
        driver.commit()


@pytest.mark.parametrize(
    ("use", "notes"),
    [
        pytest.param(read_by_connection, [], id="it only reads"),
        pytest.param(commit_by_driver, ["kept"], id="raw_connection()"),
        pytest.param(commit_by_connections_driver, ["kept"], id="the driver's"),
    ],
)
def test_a_connection_without_a_session_is_an_obstacle_whoever_gets_it_next(
    use: Callable[[Engine], None],
    notes: list[str],
    registry: scoped_session[Session],
    postgres_database: Database,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What is committed on it is not seen, so it may have been."""
    caplog.set_level(logging.INFO)

    def work() -> None:
        use(engine_of(registry))
        registry.execute(text("SELECT 1"))

    assert run(registry, work) == 1
    assert postgres_database.notes() == notes
    assert "but it used a connection without a Session, which may have committed" in caplog.text


def test_a_connection_that_the_pool_had_to_replace_is_not_taken_for_a_raw_one(
    registry: scoped_session[Session],
) -> None:
    """A listener of the application's finds the pooled connection dead, and asks for another."""
    checkouts: list[None] = []

    def refuse_first(*_: object) -> None:
        checkouts.append(None)
        if len(checkouts) % 2:
            raise DisconnectionError

    event.listen(engine_of(registry), "checkout", refuse_first)

    assert run(registry, lambda: registry.execute(text("SELECT 1"))) == 3
    assert len(checkouts) == 6


# -- past the Session -----------------------------------------------------------------------------


def test_a_commit_of_the_sessions_own_connection_counts(
    registry: scoped_session[Session], postgres_database: Database
) -> None:
    """It happens behind the Session's back."""

    def work() -> None:
        registry.execute(INSERT)
        registry.connection().commit()

    assert run(registry, work) == 1
    assert postgres_database.notes() == ["kept"]


@pytest.mark.parametrize("commits", [True, False], ids=["committed", "rolled back"])
def test_a_session_on_a_connection_does_not_answer_for_it(
    commits: bool, registry: scoped_session[Session], postgres_database: Database
) -> None:
    """The connection had a life before the Session, and may have one after."""

    def work() -> None:
        with engine_of(registry).connect() as connection:
            with Session(connection) as session:
                session.execute(text("SELECT 1"))
            connection.execute(INSERT)
            (connection.commit if commits else connection.rollback)()

    assert run(registry, work) == 1
    assert postgres_database.notes() == (["kept"] if commits else [])


def _by_bind(connection: Connection) -> None:
    with Session(connection) as session:
        session.scalars(select(Note)).all()


def _by_binds(connection: Connection) -> None:
    with Session(binds={Note: connection}) as session:
        session.scalars(select(Note)).all()


def _by_argument(connection: Connection) -> None:
    with Session() as session:
        session.scalars(select(Note), bind_arguments={"bind": connection}).all()


@pytest.mark.parametrize(
    "use",
    [_by_bind, _by_binds, _by_argument],
    ids=["bind", "binds", "bind_arguments"],
)
def test_a_session_on_a_connection_does_not_answer_for_its_driver(
    use: Callable[[Connection], None],
    registry: scoped_session[Session],
    postgres_database: Database,
) -> None:
    """A commit of the driver's is not seen, however the Session is bound to the connection."""

    def work() -> None:
        with engine_of(registry).connect() as connection:
            driver: Any = connection.connection.driver_connection
            driver.execute(INSERT.text)
            driver.commit()
            use(connection)

    assert run(registry, work) == 1
    assert postgres_database.notes() == ["kept"]


@pytest.mark.parametrize("target", ["every Session", "the registry"])
@pytest.mark.parametrize("by", ["the application", "the middleware"])
@pytest.mark.parametrize("framework", [list_app, flask_app], ids=["raised", "error page"])
def test_a_listener_that_fails_after_the_commit_hides_nothing(
    framework: Any,
    by: str,
    target: str,
    registry: scoped_session[Session],
    postgres_database: Database,
) -> None:
    """It may have been registered before the middleware, and be called before its listeners."""
    attempts: list[None] = []

    def fail(_: object) -> None:
        raise Retry

    def work() -> None:
        attempts.append(None)
        registry.execute(INSERT)
        if by == "the application":
            registry.commit()

    listened: Any = Session if target == "every Session" else registry.session_factory
    event.listen(listened, "after_commit", fail, insert=True)
    try:
        app = protect(framework(work), registry)
        if framework is flask_app and by == "the application":
            assert drive(app, "POST").status[:3] == "500"
        else:
            with pytest.raises(Retry):
                drive(app, "POST")
    finally:
        event.remove(listened, "after_commit", fail)

    assert len(attempts) == 1
    assert postgres_database.notes() == ["kept"]


def test_an_error_in_the_flush_of_a_commit_does_not_hide_that_its_answer_was_lost(
    registry: scoped_session[Session], postgres_database: Database
) -> None:
    """A listener tries something in a savepoint on the way to the COMMIT."""

    def attempt_something(session: Session, *_: object) -> None:
        with contextlib.suppress(DBAPIError), session.begin_nested():
            session.execute(text("SELECT nonsense"))

    with Proxy.to(postgres_database.url) as proxy:
        engine = make_engine(proxy.url(postgres_database.url))
        proxied = make_registry(engine)
        event.listen(proxied.session_factory, "before_commit", attempt_something)

        def insert_and_commit() -> None:
            proxied.execute(INSERT)
            proxied.commit()

        work = Restless(insert_and_commit)
        proxy.eat_commit_answer()
        with pytest.raises(DBAPIError):
            drive(protect(list_app(work), proxied, on=DBAPIError), "POST")
        engine.dispose()

    assert work.attempts == 1
    assert postgres_database.notes() == ["kept"]


@pytest.mark.parametrize("times", [1, 2], ids=["made once", "made by two applications"])
def test_a_commit_on_the_primary_of_replicas_that_were_made_late_counts(
    times: int, engine: Engine, postgres_database: Database
) -> None:
    """``Replicas`` replaces the method that commits, and sends COMMIT without calling the old."""
    early = make_registry(engine)
    assert run(early, lambda: early.execute(text("SELECT 1"))) == 3

    for number in range(times):
        replicas = Replicas(engine, [engine], secret="a secret of sixteen bytes")
        registry = make_registry(engine, class_=replicas.Session)
        work = Restless(functools.partial(insert_and_commit, registry))
        app = replicas.wrap(protect(list_app(work), registry))
        with pytest.raises(Retry):
            drive(app, "POST")
        assert work.attempts == 1
        assert len(postgres_database.notes()) == number + 1


# -- opened before the attempt --------------------------------------------------------------------


def begun_session(engine: Engine) -> Session:
    session = Session(engine)
    session.execute(text("SELECT 1"))
    return session


@pytest.mark.parametrize("end", ["commit", "rollback"])
@pytest.mark.parametrize("opened", [Engine.connect, begun_session], ids=["Connection", "Session"])
def test_a_commit_counts_though_its_connection_was_opened_before_the_attempt(
    opened: Callable[[Engine], Any],
    end: str,
    registry: scoped_session[Session],
    postgres_database: Database,
) -> None:
    """An outer middleware, or a thread, keeps a connection that several requests use."""
    protect(list_app(lambda: None), registry)  # from here on it listens
    kept = opened(postgres_database.engine)

    def work() -> None:
        kept.execute(INSERT)
        getattr(kept, end)()

    assert run(registry, work) == (1 if end == "commit" else 3)
    assert postgres_database.notes() == (["kept"] if end == "commit" else [])
    kept.close()


def test_a_kept_connection_of_a_read_only_engine_is_no_obstacle(
    notes: scoped_session[Session], sqlite_database: Database
) -> None:
    """Nothing can be written on it, so its commit commits nothing."""
    protect(list_app(lambda: None), notes)
    reads = read_only_engine(sqlite_database.engine)
    with reads.connect() as kept:

        def work() -> None:
            kept.execute(text("SELECT * FROM note"))
            kept.commit()

        assert run(notes, work) == 3
    reads.dispose()


def test_a_pool_without_an_engine_may_be_used(notes: scoped_session[Session]) -> None:
    """It has no dialect whose commits could be seen, so its use is an obstacle."""
    connect: Any = functools.partial(sqlite3.connect, ":memory:")
    pool = NullPool(connect)

    assert run(notes, lambda: pool.connect().close()) == 1


# -- AUTOCOMMIT -----------------------------------------------------------------------------------


def _by_engine(engine: Engine) -> Engine:
    return make_engine(engine.url, isolation_level="AUTOCOMMIT")


def _by_option(engine: Engine) -> Engine:
    return engine.execution_options(isolation_level="AUTOCOMMIT")


def _by_driver(engine: Engine) -> Engine:
    def switch(connection: Any, *_: object) -> None:
        connection.autocommit = True

    event.listen(engine, "checkout", switch)
    return engine


WAYS = {"the engine": _by_engine, "an option": _by_option, "the driver": _by_driver}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("with_session", [True, False], ids=["Session", "Connection"])
def test_a_statement_at_autocommit_counts(
    way: str, with_session: bool, engine: Engine, postgres_database: Database
) -> None:
    """No COMMIT is sent, and the row is there."""
    autocommit = WAYS[way](engine)
    registry = make_registry(autocommit)

    def work() -> None:
        if with_session:
            registry.execute(INSERT)
        else:
            with autocommit.connect() as connection:
                connection.execute(INSERT)

    assert run(registry, work) == 1
    assert postgres_database.notes() == ["kept"]
    autocommit.dispose()


def test_sqlite_without_transactions_counts(sqlite_database: Database) -> None:
    """``isolation_level=None`` of sqlite3, where no listener begins a transaction."""
    engine = create_engine(sqlite_database.url, connect_args={"isolation_level": None})
    registry = make_registry(engine)

    assert run(registry, lambda: registry.execute(INSERT)) == 1
    assert sqlite_database.notes() == ["kept"]
    engine.dispose()


def test_autocommit_of_the_driver_is_seen_when_it_is_switched_on_late(
    engine: Engine, postgres_database: Database
) -> None:
    """The Session's transaction has begun, the database's has not."""
    registry = make_registry(engine)

    def work() -> None:
        driver: Any = registry.connection().connection
        driver.driver_connection.autocommit = True
        registry.execute(INSERT)

    assert run(registry, work) == 1
    assert postgres_database.notes() == ["kept"]


def test_psycopg_ignores_that_autocommit_is_to_be_read_only(postgres_database: Database) -> None:
    """So the option does not prove that nothing was written: asked is what the server reports."""
    replica = postgres_database.engine.execution_options(
        isolation_level="AUTOCOMMIT", postgresql_readonly=True
    )
    registry = make_registry(replica)

    assert run(registry, lambda: registry.execute(INSERT)) == 1
    assert postgres_database.notes() == ["kept"]


@pytest.mark.parametrize("commit", [True, False], ids=["committed", "not committed"])
def test_reading_at_autocommit_where_nothing_can_be_written_is_no_obstacle(
    commit: bool, driver: str, postgres_database: Database
) -> None:
    """The server refuses every write, and says so by itself."""
    url = postgres_database.url.set(drivername=f"postgresql+{driver}")
    engine = make_engine(url, isolation_level="AUTOCOMMIT")

    def forbid(connection: Any, _: object) -> None:
        cursor = connection.cursor()
        cursor.execute("SET default_transaction_read_only = on")
        cursor.close()
        connection.commit()

    event.listen(engine, "connect", forbid)
    registry = make_registry(engine)

    def work() -> None:
        registry.execute(text("SELECT 1"))
        if commit:
            registry.commit()

    assert run(registry, work) == 3
    engine.dispose()


def test_an_engine_that_is_marked_as_read_only_is_no_obstacle(
    sqlite_database: Database,
) -> None:
    """Of any database: whoever made it answers for that."""
    replica = make_engine(sqlite_database.url, isolation_level="AUTOCOMMIT")
    registry = make_registry(replica.execution_options(wsgi_dbsession_read_only=True))

    def work() -> None:
        registry.execute(text("SELECT * FROM note"))
        registry.commit()

    assert run(registry, work) == 3
    replica.dispose()


def test_an_error_elsewhere_does_not_make_a_read_at_autocommit_an_obstacle(
    engine: Engine, postgres_database: Database
) -> None:
    """It is looked at again after its own errors only."""
    registry = make_registry(engine)
    replica = make_engine(postgres_database.url, isolation_level="AUTOCOMMIT")

    def forbid(connection: Any, _: object) -> None:
        connection.execute("SET default_transaction_read_only = on")

    event.listen(replica, "connect", forbid)

    def work() -> None:
        registry.execute(text("SELECT 1"), bind_arguments={"bind": replica})
        with pytest.raises(DBAPIError):
            registry.execute(text("SELECT nonsense"))
        registry.rollback()

    assert run(registry, work) == 3
    replica.dispose()


def test_a_connection_that_could_not_be_replaced_raises_its_own_error(
    driver: str, postgres_database: Database
) -> None:
    """The listener must not ask for the driver's connection, where there is none."""
    url = postgres_database.url.set(drivername=f"postgresql+{driver}")
    with Proxy.to(url) as proxy:
        engine = make_engine(proxy.url(url), isolation_level="AUTOCOMMIT")
        registry = make_registry(engine)

        def work() -> None:
            connection = registry.connection()
            connection.execute(text("SET default_transaction_read_only = on"))
            registry.commit()
            connection = registry.connection()
            connection.invalidate()
            connection.rollback()
            proxy.refuse()
            with pytest.raises(DBAPIError, match=r"(?i)connect"):
                connection.execute(text("SELECT 1"))
            proxy.listen()

        assert run(registry, work) == 1  # it was not read-only yet
        engine.dispose()


def test_a_commit_in_an_isolated_test_counts(
    registry: scoped_session[Session], postgres_database: Database
) -> None:
    """It is a savepoint there, and the application is tried as in production."""

    def work() -> None:
        registry.execute(INSERT)
        with registry.begin_nested():
            registry.execute(INSERT)

    def commit() -> None:
        work()
        registry.commit()

    with isolate(registry):
        assert run(registry, work) == 3
        assert run(registry, commit) == 1
    assert postgres_database.notes() == []


# -- what is kept ---------------------------------------------------------------------------------


def test_sessions_that_were_closed_without_a_commit_are_not_kept(
    registry: scoped_session[Session],
) -> None:
    """A long stream may use thousands of its own."""
    alive: list[weakref.ref[Any]] = []

    def work() -> None:
        for _ in range(5):
            session = registry.session_factory()
            alive.extend([weakref.ref(session), weakref.ref(session.connection())])
            session.close()
        del session
        gc.collect()
        assert [ref for ref in alive if ref() is not None] == []

    assert run(registry, work) == 3


def test_a_commit_that_was_refused_is_no_commit(
    registry: scoped_session[Session], postgres_database: Database
) -> None:
    """The application deals with a violated constraint, and asks for another attempt."""

    def work() -> None:
        registry.execute(text("INSERT INTO book (author_id) VALUES (7)"))
        with pytest.raises(DBAPIError):
            registry.commit()
        registry.rollback()

    assert run(registry, work) == 3
    assert postgres_database.committed(Note.text) == []
