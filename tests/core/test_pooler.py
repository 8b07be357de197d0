"""A pooler that lends the server's connections is named in the log, at the first connect."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from sqlalchemy import create_engine, text

from wsgi_dbsession import session_scope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Engine
    from sqlalchemy.orm import Session, scoped_session

    from tests.support.models import Database

    MakeEngine = Callable[..., Engine]


@pytest.fixture
def make(
    postgres_database: Database, sqlite_registry: scoped_session[Session]
) -> Iterator[MakeEngine]:
    """Make engines of the test's database, in a process that has adopted a registry."""
    with session_scope(sqlite_registry):
        pass
    engines: list[Engine] = []

    def make(driver: str = "psycopg", **options: Any) -> Engine:
        url = postgres_database.url.set(drivername=f"postgresql+{driver}")
        engines.append(create_engine(url, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.dispose()


@pytest.fixture
def behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pooler, by what it answers; tests/clusters/test_pgbouncer_state.py has a real one."""
    monkeypatch.setattr(psycopg.ConnectionInfo, "backend_pid", 1)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]


@pytest.mark.usefixtures("behind")
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="by default"),
        pytest.param({"isolation_level": "AUTOCOMMIT"}, id="at AUTOCOMMIT"),
    ],
)
def test_the_first_connection_to_a_pooler_is_a_warning(
    options: dict[str, Any], make: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """One for the engine, with what to pass; the connection is as it was."""
    engine = make(**options)
    first, second = engine.raw_connection(), engine.raw_connection()

    driver: Any = first.driver_connection
    assert driver.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
    first.close()
    second.close()
    (line,) = warnings(caplog)
    assert "connect_args={'prepare_threshold': None}" in line


@pytest.mark.usefixtures("behind")
@pytest.mark.parametrize(
    ("driver", "options"),
    [
        pytest.param("psycopg", {"connect_args": {"prepare_threshold": None}}, id="as it says"),
        pytest.param("psycopg", {"connect_args": {"prepare_threshold": 6}}, id="by choice"),
        pytest.param("psycopg2", {}, id="psycopg2"),
        pytest.param("pg8000", {}, id="pg8000"),
    ],
)
def test_what_prepares_nothing_by_default_is_no_warning(
    driver: str, options: dict[str, Any], make: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor what somebody has chosen: poolers that support prepared statements exist."""
    with make(driver, **options).connect() as connection:
        connection.execute(text("SELECT 1"))

    assert warnings(caplog) == []


def test_the_server_itself_is_no_pooler(
    make: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """The process that answers is the one that let the client in."""
    with make().connect() as connection:
        connection.execute(text("SELECT 1"))

    assert warnings(caplog) == []


def test_a_question_that_fails_is_not_the_application_s_error(
    make: MakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its own statements tell what is wrong, if anything is."""

    def fail(_: object) -> int:
        raise psycopg.OperationalError

    monkeypatch.setattr(psycopg.ConnectionInfo, "backend_pid", property(fail))

    with make().connect() as connection:
        assert connection.scalar(text("SELECT 1")) == 1

    assert warnings(caplog) == []
