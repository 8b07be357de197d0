"""A ``released()`` block does in an isolation what it does in production."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy import select, text

from tests.support.models import Note
from tests.support.wsgi import make_registry
from tests.testing.applications import add, make_app, notes, request
from wsgi_dbsession import current_scope
from wsgi_dbsession.testing import isolate

if TYPE_CHECKING:
    from tests.support.models import Database
    from tests.testing.applications import Registry


@pytest.fixture
def registry(driver_database: Database) -> Registry:
    """A registry that uses each of the drivers."""
    return make_registry(driver_database.engine)


def test_what_only_read_is_released(registry: Registry, driver_database: Database) -> None:
    """Even if the test has written before; what follows is undone with the rest."""

    def work() -> None:
        note = registry.scalars(select(Note)).one()
        with current_scope().released():
            assert note.text == "there"
            with pytest.raises(RuntimeError, match="no statement may run in the released"):
                registry.scalar(text("SELECT 1"))
            add(registry, "by another scope")
        note.text = "changed"

    with isolate(registry):
        add(registry, "there")
        assert request(make_app(work, registry)) == 200
        assert sorted(notes(registry)) == ["by another scope", "changed"]

    assert driver_database.notes() == []


def test_what_was_written_is_refused(registry: Registry) -> None:
    """The isolation knows which transaction wrote."""

    def work() -> None:
        registry.execute(text("INSERT INTO note (text) VALUES ('kept')"))
        with (
            pytest.raises(RuntimeError, match="something was written or is pending"),
            current_scope().released(),
        ):
            pass

    with isolate(registry):
        assert request(make_app(work, registry)) == 200
        assert notes(registry) == ["kept"]
