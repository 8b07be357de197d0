"""Work that is discarded without a word is refused in an isolation as in production."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy import insert, select, text

from tests.support.models import Note
from tests.support.wsgi import make_registry
from tests.testing.applications import add, make_app, notes, request
from wsgi_dbsession.testing import isolate

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from tests.support.models import Database
    from tests.testing.applications import Registry

    Work: TypeAlias = Callable[[Registry], object]


@pytest.fixture
def registry(driver_database: Database) -> Registry:
    """A registry that uses each of the drivers."""
    return make_registry(driver_database.engine)


def _orm(registry: Registry) -> None:
    registry.add(Note(text="lost"))
    registry.flush()


def _core(registry: Registry) -> None:
    registry.execute(insert(Note).values(text="lost"))


def _textual(registry: Registry) -> None:
    registry.execute(text("INSERT INTO note (text) VALUES ('lost')"))


def _cursor(registry: Registry) -> None:
    cursor = registry.connection().connection.cursor()
    cursor.execute("INSERT INTO note (text) VALUES ('lost')")
    cursor.close()


@pytest.mark.parametrize("write", [_orm, _core, _textual, _cursor])
@pytest.mark.parametrize("others", [False, True], ids=["alone", "after others"])
def test_discarded_work_is_refused(registry: Registry, write: Work, others: bool) -> None:
    """The teardown of every tutorial, after a write of whatever kind."""

    def work() -> None:
        write(registry)
        registry.remove()

    failed = make_app(int, registry, status="503 Service Unavailable")
    app = make_app(work, registry, commit_error=failed)
    with isolate(registry) as outcomes:
        if others:
            add(registry, "kept")
        assert request(app) == 503
        assert outcomes[1 if others else 0].reason == "rolled back"
        assert notes(registry) == (["kept"] if others else [])


def test_a_discarded_read_is_not_refused(registry: Registry) -> None:
    """What others have written in the shared transaction is none of its work."""

    def work() -> None:
        registry.scalars(select(Note)).all()
        add(registry, "audit")
        registry.scalars(select(Note)).all()
        registry.remove()

    with isolate(registry) as outcomes:
        add(registry, "before")
        assert request(make_app(work, registry)) == 200
        assert outcomes[1].outcome == "commit"
        assert notes(registry) == ["before", "audit"]
