"""Fixtures: a PostgreSQL server for the run, databases for the worker, tables for the test."""

from __future__ import annotations

import contextlib
import os
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Or pytest's plugin imports it when a worker's session ends, which takes so long on a busy machine
# that pytest-xdist kills the worker before it has written what it covered.
import hypothesis  # noqa: F401
import pytest
from sqlalchemy import event
from sqlalchemy.pool import Pool

from tests.support import postgres
from tests.support.models import Base, Database, make_database
from tests.support.wsgi import assert_nothing_left, make_registry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import URL
    from sqlalchemy.orm import Session, scoped_session
    from sqlalchemy.pool import ConnectionPoolEntry

DIRECTORY = pytest.StashKey[Path]()

# TRUNCATE, and ALTER SEQUENCE, would make new files.
EMPTY = """
    DELETE FROM book;
    DELETE FROM author;
    DELETE FROM note;
    SELECT setval('book_id_seq', 1, false);
    SELECT setval('author_id_seq', 1, false);
    SELECT setval('note_id_seq', 1, false);
"""

# The rings of the tests but the first. A directory of that name is in it, wherever it stands; a
# module and a test say it by a marker.
RINGS = ("servers", "frameworks", "clusters", "long")
# Fixtures that start a server of their own, which takes seconds.
SERVERS = {"mariadb_url", "mysql_url"}


@pytest.hookimpl(tryfirst=True)  # before pytest selects what its option -m asks for
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with its ring."""
    for item in items:
        for ring in set(RINGS).intersection(item.nodeid.partition("::")[0].split("/")):
            item.add_marker(ring)
        if SERVERS.intersection(getattr(item, "fixturenames", ())):
            item.add_marker("clusters")
        if not any(map(item.get_closest_marker, RINGS)):
            item.add_marker("first")


# The connections of each pool, with its entry for it. They are held, because Python 3.13 complains
# of one that is left to the collector, in whatever test that happens.
_opened: list[tuple[weakref.ref[ConnectionPoolEntry], Any]] = []


@event.listens_for(Pool, "connect")
def _on_connect(driver: Any, record: ConnectionPoolEntry) -> None:
    _opened.append((weakref.ref(record), driver))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Close the connections of engines that a test has dropped without a word."""
    held = _opened[:]
    _opened.clear()
    for record, driver in held:
        entry = record()
        if entry is not None and entry.dbapi_connection is driver:
            _opened.append((record, driver))
        else:
            with contextlib.suppress(Exception):  # it is closed, or its thread is another one
                driver.close()


def pytest_configure(config: pytest.Config) -> None:
    """Give the run's workers a place to share one PostgreSQL server."""
    workerinput: dict[str, str] | None = getattr(config, "workerinput", None)
    if workerinput is not None:
        config.stash[DIRECTORY] = Path(workerinput["postgres_directory"])
    else:
        run = postgres.Run()
        config.stash[DIRECTORY] = run.directory
        config.add_cleanup(run.end)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker of pytest-xdist where that place is."""
    node.workerinput["postgres_directory"] = str(node.config.stash[DIRECTORY])


@pytest.fixture(scope="session")
def postgres_server(pytestconfig: pytest.Config) -> postgres.Server:
    """The PostgreSQL server of this test run."""
    return postgres.server(pytestconfig.stash[DIRECTORY])


@pytest.fixture(scope="session")
def postgres_url(postgres_server: postgres.Server) -> URL:
    """A database of the worker's own, with the tables of :mod:`tests.support.models`."""
    return _create_postgres(postgres_server, "test")


@pytest.fixture(scope="session")
def other_postgres_url(postgres_server: postgres.Server) -> URL:
    """A second database like that, for transactions over two."""
    return _create_postgres(postgres_server, "other")


@pytest.fixture
def postgres_admin(
    postgres_server: postgres.Server, postgres_url: URL
) -> Iterator[postgres.Admin]:
    """A look at the worker's PostgreSQL database from outside: connections, locks, their end."""
    with postgres_server.connect() as connection:
        yield postgres.Admin(connection, str(postgres_url.database))


@pytest.fixture
def sqlite_database(tmp_path: Path) -> Iterator[Database]:
    """A SQLite file with empty tables."""
    yield from _use(make_database(f"sqlite:///{tmp_path / 'test.db'}"), create=True)


@pytest.fixture
def postgres_database(postgres_server: postgres.Server, postgres_url: URL) -> Iterator[Database]:
    """The worker's PostgreSQL database with empty tables."""
    yield from _use_postgres(postgres_server, postgres_url)


@pytest.fixture
def other_postgres_database(
    postgres_server: postgres.Server, other_postgres_url: URL
) -> Iterator[Database]:
    """The worker's second PostgreSQL database with empty tables."""
    yield from _use_postgres(postgres_server, other_postgres_url)


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest) -> Database:
    """Each of the databases in turn; at the test's end no connection may be checked out."""
    found: Database = request.getfixturevalue(f"{request.param}_database")
    return found


@pytest.fixture
def registry(database: Database) -> Iterator[scoped_session[Session]]:
    """A session registry over each of the databases in turn; nothing may be left in it."""
    yield from _use_registry(database)


@pytest.fixture
def sqlite_registry(sqlite_database: Database) -> Iterator[scoped_session[Session]]:
    """A session registry over SQLite, for what has nothing to do with the database."""
    yield from _use_registry(sqlite_database)


@pytest.fixture
def postgres_registry(postgres_database: Database) -> Iterator[scoped_session[Session]]:
    """A session registry over PostgreSQL, for what SQLite does not have."""
    yield from _use_registry(postgres_database)


def _use_registry(database: Database) -> Iterator[scoped_session[Session]]:
    made = make_registry(database.engine)
    yield made
    assert_nothing_left(made)


def _create_postgres(server: postgres.Server, name: str) -> URL:
    url = server.create_database(f"{name}_{os.environ.get('PYTEST_XDIST_WORKER', 'main')}")
    made = make_database(url)
    Base.metadata.create_all(made.observer)
    return url


def _use_postgres(server: postgres.Server, url: URL) -> Iterator[Database]:
    with server.connect() as connection:
        admin = postgres.Admin(connection, str(url.database))
        try:
            yield from _use(make_database(url))
            left = admin.prepared()
        finally:
            # What a failed test left would make all those after it wait for its locks.
            admin.terminate()
            with server.connect(admin.database) as cleaner:
                admin.forget_prepared(cleaner)
                cleaner.execute(EMPTY)
        assert not left, f"prepared transactions were left: {left}"


def _use(database: Database, *, create: bool = False) -> Iterator[Database]:
    if create:
        Base.metadata.create_all(database.observer)
    yield database
    left = _checked_out(database)
    database.engine.dispose()
    assert left == 0, f"{left} connections were not returned to the pool"


def _checked_out(database: Database) -> int:
    # QueuePool has it, and the engines of these fixtures have a QueuePool.
    pool: Any = database.engine.pool
    count: int = pool.checkedout()
    return count
