"""What all tests share: the tables, made once, and a client whose work is undone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tested_app.app import Base, app, engine, outbox

if TYPE_CHECKING:
    from flask.testing import FlaskClient


@pytest.fixture(scope="session", autouse=True)
def _tables() -> None:
    Base.metadata.create_all(engine)


@pytest.fixture
def client(dbsession_isolation: object) -> FlaskClient:
    outbox.clear()
    return app.test_client()
