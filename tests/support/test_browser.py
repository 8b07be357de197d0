"""The browser of the tests does what its methods are called."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest

from tests.support import browser as module
from tests.support.browser import Browser, BrowserError, find_chromium

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.skipif(find_chromium() is None, reason="NOT RUN: no Chromium is installed"),
    pytest.mark.long,
    pytest.mark.xdist_group("browser"),
]

PAGE = """<!doctype html><title>A page</title>
<style>
  body { background: white } @media (prefers-color-scheme: dark) { body { background: black } }
</style>
<form action="#sent" onsubmit="heard.textContent = field.value; return false">
  <input id="field"><button id="send">Send</button>
</form>
<p id="heard"></p><a id="away" href="data:text/html,<title>Away</title>gone">away</a>
<div style="width: 800px">wide</div>"""


def address(html: str) -> str:
    return f"data:text/html,{quote(html)}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser(timeout=100) as started:
        yield started


def test_a_page_is_typed_into_and_clicked(browser: Browser) -> None:
    """Text, the mouse and the Enter key arrive as a user's do."""
    browser.open(address(PAGE))

    browser.type("#field", "by mouse")
    browser.click("#send")
    browser.wait_for("heard.textContent === 'by mouse'")
    browser.evaluate("field.value = ''")
    browser.type("#field", "by key")
    browser.press("Enter")
    browser.wait_for("heard.textContent === 'by key'")

    assert browser.text("#heard") == "by key"


@pytest.fixture
def refusing() -> Iterator[str]:
    """An address at which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/"


def test_errors_of_a_page_are_kept(browser: Browser, refusing: str) -> None:
    """An uncaught exception, a console.error and a failed request are three errors."""
    browser.errors.clear()
    browser.open(
        address(f"<script>console.error('said'); null.thrown</script><img src='{refusing}a.png'>")
    )
    browser.wait_for("document.images[0].complete")
    browser.evaluate("1")

    failed, said, thrown = sorted(browser.errors, key=lambda error: ("thrown" in error, error))
    assert failed == "Image: net::ERR_CONNECTION_REFUSED"
    assert said == "said"
    assert thrown.startswith("TypeError")
    assert f"{refusing}a.png" in browser.requests


def test_sizes_and_colours_are_chosen(browser: Browser, tmp_path: Path) -> None:
    """A narrow dark page overflows, and is black on a picture."""
    browser.open(address(PAGE))
    background = "getComputedStyle(document.body).backgroundColor"
    browser.resize(1200, 900)
    assert browser.overflow() == 0
    browser.resize(375, 800)
    assert browser.overflow() > 400
    assert browser.evaluate(background) == "rgb(255, 255, 255)"

    browser.prefer(dark=True)
    browser.screenshot(tmp_path / "page.png")

    assert browser.evaluate(background) == "rgb(0, 0, 0)"
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_what_does_not_come_is_an_error(
    browser: Browser, refusing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refused command, a script that throws, a missing element and a dead address."""
    browser.open(address(PAGE))
    monkeypatch.setattr(browser, "timeout", 2)

    with pytest.raises(BrowserError, match=r"Page\.nothing: "):
        browser.send("Page.nothing")
    with pytest.raises(BrowserError, match=r"null\.x: TypeError"):
        browser.evaluate("null.x")
    with pytest.raises(BrowserError, match="not true after 2 s"):
        browser.click("#missing")
    with pytest.raises(BrowserError, match="ERR_CONNECTION_REFUSED"):
        browser.open(refusing)


def test_nothing_is_left_of_a_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process and its profile are gone, also if it never started."""
    with Browser(timeout=100) as started:
        process = started._process
    assert process.returncode is not None
    with pytest.raises((BrowserError, OSError)):
        started.send("Page.reload")

    monkeypatch.setenv("CHROMIUM", "/bin/false")
    with pytest.raises(BrowserError, match="the browser has ended"):
        Browser()
    monkeypatch.delenv("CHROMIUM")
    monkeypatch.setattr(module, "NAMES", ("no-such-browser",))
    with pytest.raises(BrowserError, match="no Chromium found"):
        Browser()
