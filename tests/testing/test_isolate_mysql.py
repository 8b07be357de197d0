"""MySQL and MariaDB are isolated, and say when they have committed by themselves."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import String, create_engine, make_url, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from tests.support.wsgi import make_registry
from tests.testing.applications import problem
from wsgi_dbsession import session_scope
from wsgi_dbsession.testing import isolate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.testing.applications import Registry


class Base(DeclarativeBase):
    pass


class Entry(Base):
    # A name for each worker: the database is the user's.
    __tablename__ = f"wsgi_dbsession_entry_{os.getpid()}"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(String(20))


@pytest.fixture(params=["REPEATABLE READ", "AUTOCOMMIT"])
def registry(request: pytest.FixtureRequest) -> Iterator[Registry]:
    """A registry on the server that TEST_MYSQL_URL names, or one at its usual place."""
    url = make_url(os.environ.get("TEST_MYSQL_URL", "mysql+pymysql://root@127.0.0.1:3306/test"))
    engine = create_engine(url, isolation_level=request.param)
    try:
        Base.metadata.create_all(engine)
    except OperationalError as error:
        if "TEST_MYSQL_URL" in os.environ:
            raise
        pytest.skip(
            "NO MARIADB OR MYSQL: isolation there is not tested. "
            f"Start one, or name one in TEST_MYSQL_URL (tried {url}: {error.orig})"
        )
    yield make_registry(engine)
    Base.metadata.drop_all(engine)
    engine.dispose()


def add(registry: Registry, word: str) -> None:
    with session_scope(registry):
        registry.add(Entry(text=word))


def entries(registry: Registry) -> list[str]:
    with session_scope(registry):
        return list(registry.scalars(select(Entry.text).order_by(Entry.id)))


def test_scopes_and_savepoints_are_isolated(registry: Registry) -> None:
    """As with the other databases."""
    with isolate(registry):
        add(registry, "committed")
        with session_scope(registry) as scope:
            registry.add(Entry(text="rolled back"))
            registry.flush()
            scope.doom()
        with session_scope(registry) as scope:
            registry.scalars(select(Entry)).all()
            add(registry, "within a reader")
            scope.doom()
        with session_scope(registry):
            savepoint = registry.begin_nested()
            registry.add(Entry(text="rolled back, too"))
            registry.flush()
            savepoint.rollback()
        with isolate(registry):
            add(registry, "inner")
            assert entries(registry) == ["committed", "within a reader", "inner"]
        assert entries(registry) == ["committed", "within a reader"]
    assert entries(registry) == []


@pytest.mark.parametrize("how", ["the driver", "a cursor", "a statement"])
def test_rows_that_remain_are_reported(registry: Registry, how: str) -> None:
    """Also if the server commits before a statement that defines a table."""
    table = f"{Entry.__tablename__}_more"
    told = problem("has ended", "If it was committed", "delete them", "that define tables")
    with told, isolate(registry):
        add(registry, "stays")
        with pytest.raises(RuntimeError, match="has ended"), session_scope(registry):
            if how == "a statement":
                registry.execute(text(f"CREATE TABLE {table} (id integer)"))
            driver = registry.connection().connection
            if how == "the driver":
                driver.commit()
            else:
                driver.cursor().execute("COMMIT AND CHAIN")
            registry.add(Entry(text="after it"))
    assert entries(registry) == ["stays"]
    with session_scope(registry):
        registry.execute(text(f"DROP TABLE IF EXISTS {table}"))
