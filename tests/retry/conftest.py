"""Fixtures: registries, and races that are lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Engine, create_engine

from tests.retry.applications import Closing, Race
from tests.retry.databases import engine_of
from tests.support.models import Database, Note, make_engine
from tests.support.postgres import DRIVERS
from tests.support.wsgi import make_registry, open_sessions
from wsgi_dbsession import session_scope

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.orm import Session, scoped_session

    from tests.support.postgres import Server


@pytest.fixture
def serializable(postgres_database: Database) -> Iterator[scoped_session[Session]]:
    """A registry over PostgreSQL at SERIALIZABLE, with one committed note."""
    engine = make_engine(postgres_database.url, isolation_level="SERIALIZABLE")
    registry = make_registry(engine)
    with session_scope(registry):
        registry.add(Note(text="first"))
    yield registry
    pool: Any = engine.pool
    left = pool.checkedout()
    engine.dispose()
    assert left == 0, f"{left} connections were not returned to the pool"
    assert not open_sessions(registry)


@pytest.fixture
def plain() -> Iterator[scoped_session[Session]]:
    """A registry for what has nothing to do with the database."""
    engine = create_engine("sqlite://")
    yield make_registry(engine)
    engine.dispose()


@pytest.fixture
def notes(sqlite_database: Database) -> scoped_session[Session]:
    """A registry over SQLite, with no note."""
    return make_registry(sqlite_database.engine)


@pytest.fixture(params=["statement", "commit"])
def race(
    request: pytest.FixtureRequest, serializable: scoped_session[Session], postgres_server: Server
) -> Race:
    """A race that is lost once, at a statement or at the COMMIT."""
    return Race(serializable, postgres_server, request.param)


@pytest.fixture
def statement_race(serializable: scoped_session[Session], postgres_server: Server) -> Race:
    """A race that is lost once, at a statement."""
    return Race(serializable, postgres_server)


@pytest.fixture(autouse=True)
def _no_closed_responses() -> None:
    Closing.closed = 0


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    """The name of each PostgreSQL driver in turn."""
    name: str = request.param
    return name


@pytest.fixture
def engine(driver: str, postgres_database: Database) -> Iterator[Engine]:
    """An engine of each driver; at the test's end no connection may be checked out."""
    with engine_of(postgres_database.url, driver) as made:
        yield made
        pool: Any = made.pool
        assert pool.checkedout() == 0
