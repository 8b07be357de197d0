"""The site: it builds without a warning, its links lead somewhere, and its search finds."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import pytest

from tests.docs.pages import DOCS, ROOT, environment
from tests.support.browser import Browser, find_chromium

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.long, pytest.mark.xdist_group("site")]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "-n", "--keep-going", "-q", "-b", "html"]
    done = subprocess.run(
        [*command, "-d", str(folder / "doctrees"), str(DOCS), str(folder / "html")],
        cwd=ROOT,
        env=environment(),
        check=False,
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return folder / "html"


class Page(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors = {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value is not None:
                self.links.append(value)
            elif name in ("id", "name") and value is not None:
                self.anchors.add(value)


def test_every_link_within_the_site_leads_somewhere(site: Path) -> None:
    """The file is there, and so is the anchor."""
    pages = {path: Page(path) for path in site.rglob("*.html")}
    assert len(pages) > 30

    dead = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link.startswith("data:"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchors = pages[target].anchors if target in pages else {unquote(parts.fragment)}
            if not target.exists() or unquote(parts.fragment) not in anchors:
                dead.append(f"{path.relative_to(site)}: {link}")
    assert dead == []


def test_every_public_name_has_its_place(site: Path) -> None:
    """The API page describes what the package exports."""
    import wsgi_dbsession

    anchors = Page(site / "reference" / "api.html").anchors
    missing = [name for name in wsgi_dbsession.__all__ if f"wsgi_dbsession.{name}" not in anchors]
    assert missing == []


def test_every_page_has_a_next_step() -> None:
    """The last line of a page leads on."""
    ends = {
        path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8").splitlines()[-1]
        for path in DOCS.rglob("*.md")
    }
    without = [
        page
        for page, end in ends.items()
        if not re.match(r"Next: .*(\]\(.+\)|choose your guide)", end)
    ]
    assert without == []


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Where the site is served."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if find_chromium() is None:
        pytest.skip("NOT RUN: no Chromium is installed")
    with Browser(timeout=100) as started:
        yield started


@pytest.mark.parametrize(
    ("words", "title"),
    [
        pytest.param("keep", "Outcomes", id="a method"),
        pytest.param("pyramid_tm", "From pyramid_tm and zope.sqlalchemy", id="another package"),
        pytest.param("gevent", "Deployment", id="a word of a page"),
        pytest.param("NoScopeError", "API", id="an exception"),
    ],
)
def test_the_search_finds(words: str, title: str, browser: Browser, address: str) -> None:
    """Typed into the box of the start page, the word leads to its page by a click."""
    browser.open(f"{address}/index.html")
    browser.type("input.sidebar-search", words)
    browser.press("Enter")
    browser.wait_for_load()
    browser.wait_for("document.querySelectorAll('#search-results li a').length > 0")
    browser.wait_for("/found|finished/.test(document.querySelector('#search-results').innerText)")

    titles = browser.evaluate(
        "[...document.querySelectorAll('#search-results li > a')].map(a => a.innerText)"
    )
    assert title in titles
    number = titles.index(title) + 1
    browser.click(f"#search-results li:nth-of-type({number}) > a")
    browser.wait_for_load()
    assert browser.text("h1").startswith(title)
    assert browser.errors == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_no_page_is_wider_than_a_telephone(dark: bool, browser: Browser, address: str) -> None:
    """Wide tables and code scroll in their own boxes."""
    browser.resize(375, 800)
    browser.prefer(dark=dark)
    wide = []
    for path in sorted(DOCS.rglob("*.md")):
        page = path.relative_to(DOCS).with_suffix(".html").as_posix()
        browser.open(f"{address}/{page}")
        if browser.overflow():
            wide.append(page)
    assert wide == []
    assert browser.errors == []
