"""Fixtures: engines with small pools over SQLite files, and watches that are closed again."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import QueuePool, create_engine

from tests.support.wsgi import make_registry
from wsgi_dbsession.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sqlalchemy import Engine
    from sqlalchemy.orm import Session, scoped_session


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    """Make engines, each with a SQLite file and a pool of its own."""
    engines: list[Engine] = []
    numbers = itertools.count()

    def make(**options: Any) -> Engine:
        if not options:
            options = {"pool_size": 2, "max_overflow": 0, "pool_timeout": 0.05}
        options.setdefault("poolclass", QueuePool)
        engine = create_engine(f"sqlite:///{tmp_path / f'{next(numbers)}.db'}", **options)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.dispose()


@pytest.fixture
def engine(make_engine: Callable[..., Engine]) -> Engine:
    """An engine with a pool of two."""
    return make_engine()


@pytest.fixture
def registry(engine: Engine) -> scoped_session[Session]:
    """A session registry over that engine."""
    return make_registry(engine)


@pytest.fixture
def make_watch() -> Iterator[Callable[..., Watch]]:
    """Make watches, and close them at the test's end."""
    watches: list[Watch] = []

    def make(*registries: Any, **options: Any) -> Watch:
        watches.append(Watch(*registries, **options))
        return watches[-1]

    yield make
    for watch in watches:
        watch.close()


@pytest.fixture
def watch(registry: scoped_session[Session], make_watch: Callable[..., Watch]) -> Watch:
    """A watch of that registry that never warns."""
    return make_watch(registry)
