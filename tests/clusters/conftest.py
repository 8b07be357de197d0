"""Fixtures: engines and session registries that leave no connection behind."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_engine, event

from tests.support.models import Base
from tests.support.wsgi import make_registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import URL, Engine
    from sqlalchemy.orm import Session, scoped_session

    MakeEngine = Callable[..., Engine]
    MakeRegistry = Callable[..., scoped_session[Session]]


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    """Make engines; at the test's end no connection is checked out, and all are closed."""
    engines: list[Engine] = []
    sockets: list[Any] = []

    def keep(connection: object, _: object) -> None:
        # pg8000 forgets them, not closed, where it cannot say goodbye to the server.
        sockets.extend(getattr(connection, name, None) for name in ("_sock", "_usock"))

    def make(url: URL | str, **options: Any) -> Engine:
        engine = create_engine(url, **options)
        event.listen(engine, "connect", keep)
        engines.append(engine)
        return engine

    yield make
    pools: list[Any] = [engine.pool for engine in engines]
    left = sum(pool.checkedout() for pool in pools)
    for engine in engines:
        engine.dispose()
    for each in sockets:
        with contextlib.suppress(OSError):
            if each is not None:
                each.close()
    assert left == 0, f"{left} connections were not returned to the pool"


@pytest.fixture
def make_session(make_engine: MakeEngine) -> MakeRegistry:
    """Make session registries as applications do, each with an engine of its own."""

    def make(url: URL | str, *, twophase: bool = False, **options: Any) -> scoped_session[Session]:
        return make_registry(make_engine(url, **options), twophase=twophase)

    return make


def create_tables(url: URL) -> None:
    """Make the tables of :mod:`tests.support.models`, empty."""
    engine = create_engine(url)
    try:
        Base.metadata.drop_all(engine)
        Base.metadata.create_all(engine)
    finally:
        engine.dispose()
