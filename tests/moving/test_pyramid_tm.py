"""docs/moving/pyramid-tm.md commits textual SQL, and gives streams their Session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import InvalidRequestError
from webtest import TestApp

from tests.docs.pages import run
from tests.moving.guides import Guide

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sqlalchemy import Engine


class Shop:
    """The application with one tea on stock, and a look at what is committed."""

    def __init__(self, module: Any, engine: Engine, *, moved: bool) -> None:
        self.module = module
        self._engine = engine
        module.Base.metadata.create_all(engine)
        wsgi_app = module.main({}, **{"sqlalchemy.url": str(engine.url)})
        self.client = TestApp(wsgi_app)
        factory = [] if moved else [wsgi_app.registry["dbsession_factory"]]
        module.add_item(*factory, "tea", 1)

    def post(self, path: str, item: str) -> int:
        code: int = self.client.post(path, {"item": item}, expect_errors=True).status_code
        return code

    def count(self, query: str) -> int:
        with self._engine.connect() as connection:
            number: int = connection.scalar(text(query))
        return number

    def stock(self) -> int:
        return self.count("SELECT number FROM item WHERE name = 'tea'")

    def orders(self) -> int:
        return self.count('SELECT count(*) FROM "order"')


@pytest.fixture
def guide(tmp_path: Path) -> Guide:
    return Guide("pyramid-tm", tmp_path)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = create_engine(f"sqlite:///{tmp_path / 'shop.db'}")
    yield engine
    engine.dispose()


@pytest.fixture
def before(guide: Guide, engine: Engine) -> Iterator[Shop]:
    with guide.imported() as module:
        yield Shop(module, engine, moved=False)


@pytest.fixture
def after(guide: Guide, engine: Engine) -> Iterator[Shop]:
    guide.carry_out()
    with guide.imported() as module:
        yield Shop(module, engine, moved=True)
        module.Session.session_factory.kw["bind"].dispose()


@pytest.mark.parametrize("carried_out", [False, True], ids=["before", "after"])
def test_the_tests_of_the_shop_pass(carried_out: bool, guide: Guide, engine: Engine) -> None:
    """They are changed by the guide as well, and leave no row."""
    if carried_out:
        guide.carry_out()
    url = str(engine.url)
    output = run(guide.folder, "pytest", "-q", "-p", "no:cacheprovider", DATABASE_URL=url)
    assert "2 passed" in output
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM item")) == 0


def assert_orders_are_whole(shop: Shop) -> None:
    """One tea can be sold once, and only that sale sends a mail."""
    assert shop.post("/orders", "tea") == 201
    assert shop.post("/orders", "tea") == 409
    assert shop.post("/orders", "coffee") == 404
    assert (shop.stock(), shop.orders()) == (0, 1)
    assert shop.module.mails == ["order 1"]


def test_before_textual_sql_is_lost(before: Shop) -> None:
    """The stock is as it was after the 201."""
    assert_orders_are_whole(before)
    assert before.post("/restock", "tea") == 201
    assert before.stock() == 0


def test_before_a_stream_has_a_closed_session(before: Shop) -> None:
    """It was closed before the first block."""
    with pytest.raises(InvalidRequestError, match="identity map"):
        before.client.get("/items")


def test_after_every_change_counts(after: Shop) -> None:
    """Orders are as before, and the stock is filled; the stream has its Session."""
    assert_orders_are_whole(after)
    assert after.post("/restock", "tea") == 201
    assert after.stock() == 10
    assert after.client.get("/items").text == "tea\n"
