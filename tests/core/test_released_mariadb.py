"""``released()`` on MariaDB, which tells what was written to users with a privilege only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import URL, create_engine, text

from tests.support.galera import mariadb
from tests.support.wsgi import make_registry
from wsgi_dbsession import session_scope

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Engine

pytestmark = [
    pytest.mark.promise("released"),
    pytest.mark.clusters,
    pytest.mark.xdist_group("mariadb"),
]

COUNT = text("SELECT n FROM counter")
COUNT_UP = text("UPDATE counter SET n = n + 1")


@pytest.fixture(scope="module")
def url() -> Iterator[URL]:
    """A server with a second user, who may use tables and nothing else."""
    with mariadb() as server:
        engine = create_engine(server.url())
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE counter (n INTEGER) ENGINE = InnoDB"))
            connection.execute(text("CREATE USER plain@'%' IDENTIFIED BY 'plain'"))
            connection.execute(text("GRANT ALL ON *.* TO plain@'%'"))
            connection.execute(text("REVOKE PROCESS ON *.* FROM plain@'%'"))
        engine.dispose()
        yield server.url()


@pytest.fixture(params=["with PROCESS", "without PROCESS"])
def engine(request: pytest.FixtureRequest, url: URL) -> Iterator[Engine]:
    """An engine of either user, and an empty counter."""
    if request.param == "without PROCESS":
        url = url.set(username="plain", password="plain")
    made = create_engine(url, pool_size=1, max_overflow=0, pool_timeout=5)
    with made.begin() as connection:
        connection.execute(text("DELETE FROM counter"))
        connection.execute(text("INSERT INTO counter VALUES (0)"))
    yield made
    made.dispose()


def tells(engine: Engine) -> bool:
    return engine.url.username != "plain"


def test_what_was_rolled_back_with_its_savepoint_is_not_called_lost(engine: Engine) -> None:
    """InnoDB counts it further on."""
    registry = make_registry(engine)

    with session_scope(registry) as scope:
        savepoint = registry.begin_nested()
        registry.execute(COUNT_UP)
        savepoint.rollback()
        with pytest.raises(RuntimeError, match="cannot be known here"), scope.released():
            pass
        registry.remove()

    assert scope.outcome == "commit"


def test_a_write_is_refused_and_not_lost(engine: Engine) -> None:
    """For the one because it wrote, for the other because it may have."""
    registry = make_registry(engine)
    words = "something was written" if tells(engine) else "cannot be known here.*PROCESS"

    with session_scope(registry) as scope:
        registry.execute(COUNT_UP)
        with pytest.raises(RuntimeError, match=words), scope.released():
            pass

    with session_scope(registry):
        assert registry.scalar(COUNT) == 1


def test_a_read_is_released_where_that_is_known(engine: Engine) -> None:
    """Elsewhere the application says that it has nothing to lose."""
    registry = make_registry(engine, expire_on_commit=False)
    pool: Any = engine.pool

    with session_scope(registry) as scope:
        assert registry.scalar(COUNT) == 0
        if not tells(engine):
            with pytest.raises(RuntimeError, match="cannot be known here"):
                scope.released().__enter__()
            registry.commit()
        with scope.released():
            assert pool.checkedout() == 0
        registry.execute(COUNT_UP)

    with session_scope(registry):
        assert registry.scalar(COUNT) == 1


@pytest.mark.parametrize("engine", ["with PROCESS"], indirect=True)
def test_two_phase_sessions_are_released(engine: Engine) -> None:
    """An XA transaction that is not prepared is rolled back."""
    registry = make_registry(engine, twophase=True)

    with session_scope(registry) as scope:
        assert registry.scalar(COUNT) == 0
        with scope.released():
            pass
        registry.execute(COUNT_UP)
        with pytest.raises(RuntimeError, match="something was written"), scope.released():
            pass

    with session_scope(registry):
        assert registry.scalar(COUNT) == 1
