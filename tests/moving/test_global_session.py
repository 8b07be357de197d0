"""docs/moving/global-session.md cures the 500s after a day."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.exc import IntegrityError, SAWarning

from tests.moving.guides import Guide
from tests.support.postgres import Admin

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.postgres import Server

DATABASE = f"moving_{os.getpid()}"


@pytest.fixture
def guide(tmp_path: Path, postgres_server: Server, monkeypatch: pytest.MonkeyPatch) -> Guide:
    url = postgres_server.create_database(DATABASE)
    monkeypatch.setenv("DATABASE_URL", url.render_as_string(hide_password=False))
    return Guide("global-session", tmp_path)


@pytest.fixture
def admin(postgres_server: Server) -> Iterator[Admin]:
    with postgres_server.connect() as connection:
        yield Admin(connection, DATABASE)


def status(client: Any, method: str, path: str, **form: str) -> int:
    """Send a request, and answer an error that reaches the server with a 500, as servers do."""
    try:
        code: int = client.open(path, method=method, data=form).status_code
    except IntegrityError:
        return 500
    return code


def statuses(client: Any) -> list[int]:
    """Sign twice with the same name, as people do; then look, and sign again."""
    return [
        status(client, "POST", "/guests", name="ann"),
        status(client, "POST", "/guests", name="ann"),
        status(client, "GET", "/guests"),
        status(client, "POST", "/guests", name="bob"),
        status(client, "POST", "/guests/ann/visits"),
    ]


def statuses_after_a_night(client: Any, admin: Admin) -> list[int]:
    """Look, and look again after the database has closed the idle connections."""
    first = client.get("/guests").status_code
    admin.terminate()
    return [first, *(client.get("/guests").status_code for _ in range(3))]


@pytest.fixture
def before(guide: Guide) -> Iterator[Any]:
    with guide.imported() as module:
        yield module.app.test_client()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SAWarning)  # of what the broken session discards
            module.session.rollback()
        module.engine.dispose()


@pytest.fixture
def after(guide: Guide) -> Iterator[Any]:
    guide.carry_out()
    with guide.imported() as module:
        yield module.app.test_client()
        module.engine.dispose()


def test_before_one_error_breaks_every_later_request(before: Any) -> None:
    """The first duplicate stops the application for good."""
    assert statuses(before) == [201, 500, 500, 500, 500]


def test_before_a_closed_connection_breaks_every_later_request(before: Any, admin: Admin) -> None:
    """The night stops it as well."""
    assert statuses_after_a_night(before, admin) == [200, 500, 500, 500]


def test_after_an_error_costs_one_request(after: Any) -> None:
    """The duplicate is refused, and the rest works."""
    assert statuses(after) == [201, 500, 200, 201, 200]
    assert after.get("/guests").json == ["ann", "bob"]
    assert after.post("/guests/ann/visits").json == {"visits": 3}


def test_after_a_closed_connection_costs_no_request(after: Any, admin: Admin) -> None:
    """The pool replaces it."""
    assert statuses_after_a_night(after, admin) == [200, 200, 200, 200]
