"""Fixtures: places, databases of each kind in turn."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import URL, create_engine, make_url
from sqlalchemy.pool import NullPool

from tests.idempotency.shop import Place, Shop, protect
from tests.support.galera import mariadb
from tests.support.postgres import DRIVERS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sqlalchemy.orm import Session, scoped_session

    from tests.support.postgres import Server

# MariaDB is a program of its own, and takes seconds to start.
MARIADB = pytest.param("mariadb", marks=pytest.mark.clusters)
PLACES = ["sqlite", "sqlite legacy", "psycopg", MARIADB]
OTHER_DRIVERS = [
    pytest.param(name, marks=pytest.mark.long) for name in DRIVERS if name != "psycopg"
]


@pytest.fixture(scope="session")
def keys_url(postgres_server: Server) -> URL:
    """A PostgreSQL database of the worker's own."""
    return postgres_server.create_database(f"keys_{os.environ.get('PYTEST_XDIST_WORKER', 'main')}")


@pytest.fixture(scope="session")
def mariadb_url() -> Iterator[URL]:
    """A MariaDB server of the worker's own; skipped by name where it is not installed."""
    with mariadb() as server:
        yield server.url()


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Each kind of database in turn."""
    yield from _make(request, request.param, tmp_path)


@pytest.fixture(params=[*PLACES, *OTHER_DRIVERS])
def every_place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Each kind of database and each driver in turn."""
    yield from _make(request, request.param, tmp_path)


@pytest.fixture(params=[*DRIVERS, MARIADB])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Each database that is a server, by each driver in turn."""
    yield from _make(request, request.param, tmp_path)


@pytest.fixture
def sqlite(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """SQLite, for what has nothing to do with the database."""
    yield from _make(request, "sqlite", tmp_path)


@pytest.fixture
def postgres(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """PostgreSQL, by psycopg."""
    yield from _make(request, "psycopg", tmp_path)


@pytest.fixture
def maria(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """MariaDB."""
    yield from _make(request, "mariadb", tmp_path)


def _make(request: pytest.FixtureRequest, name: str, directory: Path) -> Iterator[Place]:
    if name.startswith("sqlite"):
        url = make_url(f"sqlite:///{directory / 'shop.db'}")
    elif name == "mariadb":
        url = request.getfixturevalue("mariadb_url")
    else:
        url = request.getfixturevalue("keys_url").set(drivername=f"postgresql+{name}")
    made = Place(url, create_engine(url, poolclass=NullPool), legacy=name == "sqlite legacy")
    made.create()
    yield made
    made.close()


@pytest.fixture
def registry(sqlite: Place) -> scoped_session[Session]:
    """A registry over SQLite, for what has nothing to do with the database."""
    return sqlite.registry()


@pytest.fixture
def shop(registry: scoped_session[Session]) -> Shop:
    """The application, which counts its calls."""
    return Shop(registry)


@pytest.fixture
def app(shop: Shop, registry: scoped_session[Session]) -> object:
    """The application with both middlewares around it."""
    return protect(shop, registry)
