"""Fixtures: the applications' database, and Django's settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from django.conf import settings

from tests.frameworks.apps import django_app
from tests.frameworks.apps.database import Session
from tests.frameworks.scenarios import bound
from wsgi_dbsession import NoScopeError, current_scope

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.models import Database


@pytest.fixture
def shop(database: Database) -> Iterator[Database]:
    """The database that the applications' Sessions are bound to; nothing may be left behind."""
    yield from _bind(database)


@pytest.fixture
def postgres_shop(postgres_database: Database) -> Iterator[Database]:
    """The same on PostgreSQL, for two requests that write at the same time."""
    yield from _bind(postgres_database)


def _bind(database: Database) -> Iterator[Database]:
    with bound(database):
        yield database
        assert Session.registry.registry == {}, "a Session was left in the registry"
        with pytest.raises(NoScopeError):
            current_scope()


@pytest.fixture(autouse=True)
def django_settings() -> Iterator[None]:
    """Settings of this test's own, though other code of this process has set them."""
    lazy: Any = settings
    before = lazy._wrapped
    django_app.configure()
    yield
    lazy._wrapped = before
