"""The example of the watch, as its user would run it, and in a browser."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.request import Request, urlopen

import pytest

from tests.examples.test_examples import ask, running
from tests.support.browser import Browser, find_chromium

if TYPE_CHECKING:
    from pathlib import Path


def board(address: str) -> Any:
    """Return what the board shows, as JSON."""
    request = Request(f"{address}/_db", headers={"Accept": "application/json"})
    with urlopen(request, timeout=30) as response:
        return json.load(response)


def test_the_pool_of_the_example_is_exhausted(tmp_path: Path) -> None:
    """Five payments hold, three time out, and the board has their lines."""
    with (
        running("watch_app.py", tmp_path, BANK_S="4") as address,
        ThreadPoolExecutor(8) as clients,
    ):
        payments = [
            clients.submit(ask, f"{address}/pay/{number}", {"by": "card"}) for number in range(8)
        ]
        seen = board(address)
        while (
            len(seen["holders"]) < 5
            or len(seen["waiting"]) < 3
            or not all(str(each["now"]).endswith(" in ask_bank") for each in seen["holders"])
        ):
            seen = board(address)
        answers = sorted(each.result() for each in payments)
        after = board(address)

    assert all(each["line"].endswith(" in pay") for each in seen["holders"])
    assert answers == [(200, "paid, one of 0 orders")] * 5 + [(503, "no connection is free")] * 3
    assert after["holders"] == after["waiting"] == []
    assert after["pools"][0]["timeouts"] == 3


@pytest.mark.long
@pytest.mark.skipif(find_chromium() is None, reason="NOT RUN: no Chromium is installed")
def test_a_click_exhausts_the_pool(tmp_path: Path) -> None:
    """The board shows it, and the page what became of the payments."""
    with running("watch_app.py", tmp_path, BANK_S="8") as address, Browser(timeout=100) as browser:
        browser.open(address)
        browser.click("button")
        browser.wait_for("document.querySelectorAll('li').length === 8")
        for answer in ("503 no connection", "200 paid"):
            browser.wait_for(f"document.querySelector('ul').innerText.includes('{answer}')")
        browser.open(f"{address}/_db")
        browser.wait_for("document.querySelectorAll('#ended tbody tr').length >= 6")
        assert "POST /pay/" in browser.text("#places")
