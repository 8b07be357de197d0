"""The page of the demo in a Chromium: as wide as its window, with links that lead back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.examples.test_demo import starting, wait_for_address
from tests.support.browser import Browser, find_chromium

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.servers,
    pytest.mark.skipif(find_chromium() is None, reason="NOT RUN: no Chromium is installed"),
    pytest.mark.xdist_group("browser"),
]


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    with starting(tmp_path) as process:
        yield wait_for_address(process).rstrip("/")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1200, 375])
def test_each_button_shows_what_happened(address: str, width: int, dark: bool) -> None:
    """A visitor presses each button, reads the answer, goes back and sees the timeline."""
    with Browser(width=width, dark=dark) as browser:
        browser.open(address)
        assert browser.overflow() == 0

        browser.click("#sign button")
        browser.wait_for("location.hash === '#sign'")
        assert "COMMIT" in browser.text("#sign details[open]")

        for name, words in [
            ("crash", "a bug after the INSERT"),
            ("stranger", "the commit failed"),
            ("discard", "Remove that line"),
            ("stream", "line 5 of a stream is written"),
        ]:
            browser.click(f"#{name} button")
            browser.wait_for(f"document.body.innerText.includes({words!r})")
            assert browser.overflow() == 0
            browser.click("#back")
            browser.wait_for(f"location.hash === '#{name}'")
            assert "server" in browser.text(f"#{name} details[open]")
            assert browser.overflow() == 0

        browser.click("#leave button")
        browser.wait_for("location.hash === '#leave'")
        assert "The client has gone." in browser.text("#leave details[open]")

        assert browser.errors == []
        assert {each for each in browser.requests if not each.startswith("data:")} <= {
            f"{address}/{path}"
            for path in ("", "sign", "crash", "stranger", "discard", "stream", "stream?leave")
        }
