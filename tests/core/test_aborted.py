"""A transaction that PostgreSQL has aborted does not become a success."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import create_engine, insert, text
from sqlalchemy.exc import (
    DBAPIError,
    IntegrityError,
    PendingRollbackError,
    SQLAlchemyError,
    UnboundExecutionError,
)
from sqlalchemy.orm import Session, scoped_session

from tests.support.models import Database, Note
from tests.support.wsgi import make_registry
from wsgi_dbsession import session_scope

if TYPE_CHECKING:
    from collections.abc import Callable

    Registry = scoped_session[Session]

pytestmark = pytest.mark.promise("aborted")


def divide_by_zero(registry: Registry) -> None:
    with contextlib.suppress(DBAPIError):
        registry.execute(text("SELECT 1/0"))


@pytest.mark.promise("no false success", "no silent loss")
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
    assert (scope.outcome, scope.reason) == ("rollback", "rolled back")
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


@pytest.mark.promise("no false success", "no silent loss")
def test_the_applications_own_commit_is_refused(
    driver_registry: Registry, postgres_database: Database
) -> None:
    """And the middleware's, if the application catches that error too."""
    with pytest.raises(SQLAlchemyError), session_scope(driver_registry) as scope:
        driver_registry.execute(text("INSERT INTO note (text) VALUES ('lost')"))
        divide_by_zero(driver_registry)
        with pytest.raises((PendingRollbackError, DBAPIError)):
            driver_registry.commit()
        driver_registry.add(Note(text="half"))

    assert scope.outcome == "rollback"
    assert postgres_database.notes() == []


@pytest.mark.promise("no false success", "no silent loss")
def test_the_applications_own_commit_is_refused_in_a_savepoint_of_the_connection(
    driver_registry: Registry, postgres_database: Database
) -> None:
    """SQLAlchemy does not release it, which would fail, but commits the transaction."""
    with pytest.raises((PendingRollbackError, DBAPIError)), session_scope(driver_registry):
        driver_registry.execute(text("INSERT INTO note (text) VALUES ('lost')"))
        driver_registry.connection().begin_nested()
        divide_by_zero(driver_registry)
        driver_registry.commit()

    assert postgres_database.notes() == []


@pytest.mark.promise("no false success", "no silent loss")
def test_a_block_of_the_application_is_refused(
    driver_registry: Registry, postgres_database: Database
) -> None:
    """It is rolled back, and another one may be begun."""
    with session_scope(driver_registry):
        with pytest.raises((PendingRollbackError, DBAPIError)), driver_registry.begin():
            driver_registry.execute(text("INSERT INTO note (text) VALUES ('lost')"))
            divide_by_zero(driver_registry)
        driver_registry.add(Note(text="kept"))

    assert postgres_database.notes() == ["kept"]


def test_a_connection_of_the_application_is_refused_in_a_scope(
    postgres_registry: Registry, postgres_database: Database
) -> None:
    """An ``engine.begin()`` block loses its work in the same way."""
    engine = postgres_database.engine
    with (
        pytest.raises(PendingRollbackError, match="the application caught the error"),
        session_scope(postgres_registry),
        engine.begin() as connection,
        contextlib.suppress(DBAPIError),
    ):
        connection.execute(text("SELECT 1/0"))

    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


def test_an_error_of_the_drivers_own_cursor_is_found(
    driver_registry: Registry, postgres_database: Database
) -> None:
    """SQLAlchemy has not seen it."""
    with pytest.raises(SQLAlchemyError), session_scope(driver_registry):
        driver_registry.execute(text("INSERT INTO note (text) VALUES ('lost')"))
        cursor = driver_registry.connection().connection.cursor()
        with contextlib.suppress(Exception):
            cursor.execute("SELECT 1/0")

    assert postgres_database.notes() == []


def test_what_an_aborted_transaction_had_written_is_unknown(
    driver_registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    """The database answers no question in it. So a discard is not refused, and a line is named."""
    with session_scope(driver_registry):
        divide_by_zero(driver_registry)
        driver_registry.remove()

    (record,) = caplog.records
    assert "closed a Session in an open transaction at " in record.getMessage()


@pytest.mark.parametrize("how", ["a savepoint of its own", "ROLLBACK"])
def test_a_statement_of_the_application_mends_it(
    driver_registry: Registry, postgres_database: Database, how: str
) -> None:
    """SQLAlchemy does not know of it, but the driver does."""
    with session_scope(driver_registry):
        if how == "ROLLBACK":
            divide_by_zero(driver_registry)
            driver_registry.execute(text("ROLLBACK"))
            driver_registry.add(Note(text="kept"))
        else:
            driver_registry.add(Note(text="kept"))
            driver_registry.flush()
            driver_registry.execute(text("SAVEPOINT mine"))
            divide_by_zero(driver_registry)
            driver_registry.execute(text("ROLLBACK TO SAVEPOINT mine"))

    assert postgres_database.notes() == ["kept"]


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


@pytest.mark.parametrize("begin", [lambda _: None, lambda session: session.begin_nested()])
def test_a_flush_that_failed_is_refused_with_the_fix(
    sqlite_registry: Registry, sqlite_database: Database, begin: Callable[[Session], object]
) -> None:
    """SQLAlchemy's advice, Session.rollback(), would discard the rest of the request."""
    with (
        pytest.raises(PendingRollbackError, match=r"with Session\.begin_nested"),
        session_scope(sqlite_registry),
    ):
        sqlite_registry.execute(insert(Note).values(id=1, text="a"))
        begin(sqlite_registry())
        sqlite_registry.add(Note(id=1, text="b"))
        with contextlib.suppress(IntegrityError):
            sqlite_registry.flush()

    assert sqlite_database.notes() == []


def test_a_flush_that_failed_without_a_connection_is_refused(
    sqlite_registry: Registry, sqlite_database: Database
) -> None:
    """Before the Session of another registry is committed."""
    unbound = make_registry(None)

    with (
        pytest.raises(PendingRollbackError, match=r"with Session\.begin_nested"),
        session_scope(sqlite_registry, unbound) as scope,
    ):
        sqlite_registry.execute(insert(Note).values(text="a"))
        unbound.add(Note(text="b"))
        with contextlib.suppress(UnboundExecutionError):
            unbound.flush()

    assert scope.reason == "rolled back"
    assert sqlite_database.notes() == []
