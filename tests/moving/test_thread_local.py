"""docs/moving/thread-local.md makes one transaction of each request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text

from tests.moving.guides import Guide

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Bank:
    """The application, its clients, and a look at what is committed."""

    def __init__(self, guide: Guide, module: Any) -> None:
        self._guide = guide
        self.client = module.app.test_client()
        with guide.imported("database") as database:
            self.engine = database.engine
            database.init_db()

    def accounts(self) -> dict[str, int]:
        with self.engine.connect() as connection:
            rows = connection.execute(text("SELECT name, balance FROM account ORDER BY name"))
            return {row.name: row.balance for row in rows}

    def post(self, path: str, **form: str) -> int:
        status: int = self.client.post(path, data=form).status_code
        return status


@pytest.fixture
def guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Guide:
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path / 'bank.db'}")
    return Guide("thread-local", tmp_path)


@pytest.fixture
def before(guide: Guide) -> Iterator[Bank]:
    yield from open_bank(guide)


@pytest.fixture
def after(guide: Guide) -> Iterator[Bank]:
    guide.carry_out()
    yield from open_bank(guide)


def open_bank(guide: Guide) -> Iterator[Bank]:
    with guide.imported() as module:
        bank = Bank(guide, module)
        assert bank.post("/accounts", name="ann") == 201
        assert bank.post("/accounts", name="bob") == 201
        yield bank
        bank.engine.dispose()


def test_before_a_forgotten_commit_is_a_success(before: Bank) -> None:
    """The account is there after the 204."""
    assert before.client.delete("/accounts/bob").status_code == 204
    assert before.accounts() == {"ann": 100, "bob": 100}


def test_before_half_of_a_failed_transfer_stays(before: Bank) -> None:
    """The money has left one account, and reached none."""
    assert before.post("/transfers", amount="30", **{"from": "ann", "to": "eve"}) == 404
    assert before.accounts() == {"ann": 70, "bob": 100}


def test_after_each_request_is_one_transaction(after: Bank) -> None:
    """Nothing of a failed transfer stays, and everything of a success does."""
    assert after.client.delete("/accounts/bob").status_code == 204
    assert after.accounts() == {"ann": 100}
    assert after.post("/transfers", amount="30", **{"from": "ann", "to": "bob"}) == 404
    assert after.accounts() == {"ann": 100}
    assert after.post("/accounts", name="ann") == 409
    assert after.post("/accounts", name="bob") == 201
    assert after.post("/transfers", amount="30", **{"from": "ann", "to": "bob"}) == 201
    assert after.accounts() == {"ann": 70, "bob": 130}
    assert after.client.get("/accounts/bob").json == {"balance": 130}
    assert after.client.get("/accounts/eve").status_code == 404


@pytest.mark.parametrize("carried_out", [False, True], ids=["before", "after"])
def test_the_script_adds_interest(carried_out: bool, guide: Guide) -> None:
    """The script does the same before and after."""
    if carried_out:
        guide.carry_out()
    for bank in open_bank(guide):
        with guide.imported("manage") as manage:
            manage.add_interest()
        assert bank.accounts() == {"ann": 110, "bob": 110}
