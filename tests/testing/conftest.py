"""Fixtures: a registry on each database, and a database through each driver."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.models import Database, make_engine
from tests.support.postgres import DRIVERS
from tests.support.wsgi import make_registry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.testing.applications import Registry


@pytest.fixture
def registry(database: Database) -> Registry:
    """A registry on each database."""
    return make_registry(database.engine)


@pytest.fixture(params=["sqlite", *DRIVERS])
def driver_database(request: pytest.FixtureRequest) -> Iterator[Database]:
    """A database through each of the drivers in turn."""
    if request.param == "sqlite":
        yield request.getfixturevalue("sqlite_database")
        return
    postgres: Database = request.getfixturevalue("postgres_database")
    engine = make_engine(postgres.url.set(drivername=f"postgresql+{request.param}"))
    yield Database(engine, postgres.observer)
    engine.dispose()
