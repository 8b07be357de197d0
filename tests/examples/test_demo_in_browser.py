"""The page of the demo in a Chromium: as wide as its window, with links that lead back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.examples.test_demo import starting, wait_for_address
from tests.support.browser import Browser, find_chromium

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.servers,
    pytest.mark.skipif(find_chromium() is None, reason="NOT RUN: no Chromium is installed"),
    pytest.mark.xdist_group("browser"),
]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with starting(tmp_path_factory.mktemp("demo")) as process:
        yield wait_for_address(process).rstrip("/")


def wait_for_timeline(browser: Browser, name: str, words: str) -> None:
    """Wait until the page has come back to a button, and shows what happened."""
    browser.wait_for(
        f"location.hash === '#{name}' && document.readyState === 'complete' &&"
        f"document.querySelector('#{name} details[open]').innerText.includes({words!r})"
    )
    assert browser.overflow() == 0


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1200, 375])
def test_each_button_shows_what_happened(address: str, width: int, dark: bool) -> None:
    """A visitor presses each button, reads the answer, goes back and sees the timeline."""
    with Browser(width=width, dark=dark) as browser:
        browser.open(address)
        assert browser.overflow() == 0

        browser.click("#sign button")
        wait_for_timeline(browser, "sign", "COMMIT")

        for name, answer, words in [
            ("crash", "a bug after the INSERT", "ROLLBACK"),
            ("stranger", "the commit failed", "The database refuses"),
            ("discard", "Remove that line", "cannot commit"),
            ("hold", "POST /hold, held for", "500"),
            ("stream", "line 5 of a stream is written", "The server calls"),
        ]:
            browser.click(f"#{name} button")
            browser.wait_for(
                "document.querySelector('#back') !== null &&"
                f"document.body.innerText.includes({answer!r})"
            )
            assert browser.overflow() == 0
            browser.click("#back")
            wait_for_timeline(browser, name, words)

        browser.click("#leave button")
        wait_for_timeline(browser, "leave", "The client has gone.")

        assert browser.errors == []
        paths = (
            "",
            "sign",
            "crash",
            "stranger",
            "discard",
            "stream",
            "stream?leave",
            "hold",
            "hold?sixth",
        )
        asked = {each for each in browser.requests if not each.startswith("data:")}
        assert asked <= {f"{address}/{path}" for path in paths}
