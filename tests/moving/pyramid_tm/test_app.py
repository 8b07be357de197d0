"""The application's own tests."""

import pytest
from app import Item


@pytest.mark.parametrize("number", [1, 2])
def test_an_order_takes_from_the_stock(testapp, dbsession, number):
    dbsession.add(Item(name="tea", number=number))
    dbsession.flush()

    testapp.post("/orders", {"item": "tea"}, status=201)

    assert dbsession.get(Item, "tea").number == number - 1
