"""Fixtures: two registries, a registry on each driver, one over a note."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy import create_engine

from tests.support.models import Database, Note, make_engine, without_autocommit
from tests.support.postgres import DRIVERS
from tests.support.wsgi import assert_nothing_left, make_registry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.orm import Session, scoped_session

    Registry = scoped_session[Session]


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


@pytest.fixture(params=["BEGIN recipe", "legacy transactions", "autocommit=False", "postgres"])
def stocked(request: pytest.FixtureRequest) -> Iterator[tuple[Registry, Database]]:
    """A registry over a database with one note, on SQLite as in SQLAlchemy's recipe or without."""
    name = "postgres" if request.param == "postgres" else "sqlite"
    database: Database = request.getfixturevalue(f"{name}_database")
    engine = database.engine
    if request.param == "legacy transactions":
        engine = create_engine(database.url)
    elif request.param == "autocommit=False":
        engine = without_autocommit(database.url)
    with database.observer.begin() as connection:
        connection.execute(Note.__table__.insert().values(text="there"))  # type: ignore[attr-defined]
    yield make_registry(engine), database
    engine.dispose()
