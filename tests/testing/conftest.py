"""Fixtures: a registry on each database."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.wsgi import make_registry

if TYPE_CHECKING:
    from tests.support.models import Database
    from tests.testing.applications import Registry


@pytest.fixture
def registry(database: Database) -> Registry:
    """A registry on each database."""
    return make_registry(database.engine)
