"""The board in a real browser; the screenshots are in build/board."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import pytest
from sqlalchemy import func, select, text

from tests.support.browser import Browser, find_chromium
from tests.support.wsgi import ask, make_registry
from wsgi_dbsession import SessionMiddleware, session_scope
from wsgi_dbsession.retry import Retry, RetryMiddleware
from wsgi_dbsession.watch._board import Board

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from sqlalchemy import Engine
    from sqlalchemy.orm import Session, scoped_session

    from wsgi_dbsession.watch import Watch

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(find_chromium() is None, reason="NOT RUN: no Chromium is installed"),
]

PICTURES = Path(__file__).parents[2] / "build" / "board"
ROWS = "document.querySelectorAll('#{} tbody tr').length"


class Server(ThreadingMixIn, WSGIServer):
    """The board answers while a request of the application is served."""

    daemon_threads = True


class Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Write nothing."""


@contextmanager
def serving(app: WSGIApplication) -> Iterator[str]:
    """Serve an application, and yield its address."""
    with make_server("127.0.0.1", 0, app, Server, Quiet) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser(timeout=100) as started:
        yield started


@pytest.fixture
def page(browser: Browser) -> Browser:
    """The browser, as it is when it starts."""
    browser.resize(1200, 900)
    browser.prefer(dark=False)
    browser.open("about:blank")  # the last board, whose server is gone, still asks
    browser.errors.clear()
    browser.requests.clear()
    return browser


def nothing(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    start_response("204 No Content", [])
    return []


def look(page: Browser, name: str) -> None:
    """Take the picture of the page, wide and as on a telephone, light and dark."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    for width, height in ((1200, 1000), (375, 800)):
        for dark in (False, True):
            page.resize(width, height)
            page.prefer(dark=dark)
            assert page.overflow() <= 0, f"{name} is wider than {width} pixels"
            page.screenshot(PICTURES / f"{name}-{width}-{'dark' if dark else 'light'}.png")
    page.resize(1200, 900)
    page.prefer(dark=False)


class Shop:
    """An application whose pool has five connections, and what holds them."""

    def __init__(self, engine: Engine, registry: scoped_session[Session]) -> None:
        self.engine = engine
        self.registry = registry
        self.go_on = threading.Event()
        self._threads: list[threading.Thread] = []
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE receipt (number)"))
        self.app = RetryMiddleware(SessionMiddleware(self._respond, registry), backoff=0)

    def _respond(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path.startswith("/reports"):
            self.report()
        elif path.startswith("/orders"):
            # SQLite lets one transaction write at a time.
            self.pay("INSERT INTO receipt VALUES (1)" if path == "/orders/1" else "SELECT 1")
        elif path.startswith("/lost"):
            self.registry.execute(text("SELECT 1"))
            if environ["wsgi_dbsession.attempt"] == 1:
                raise Retry
        else:
            self.registry.execute(text("SELECT 1"))
        start_response("404 Not Found" if path == "/nowhere" else "200 OK", [])
        return [b""]

    def pay(self, statement: str) -> None:
        self.registry.execute(text(statement))
        self.go_on.wait(60)  # for the bank

    def report(self) -> None:
        driver: Any = self.registry.connection().connection.dbapi_connection
        driver.create_function("sum_up", 0, lambda: self.go_on.wait(60))
        self.registry.execute(select(func.sum_up()))

    def start(self, path: str) -> None:
        """Let a thread send a request."""
        thread = threading.Thread(target=ask, args=(self.app, "GET", path), name=f"worker {path}")
        thread.start()
        self._threads.append(thread)

    def stop(self) -> None:
        """Let all requests go on, and wait for them."""
        self.go_on.set()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def shop(make_engine: Callable[..., Engine]) -> Iterator[Shop]:
    engine = make_engine(
        pool_size=5, max_overflow=0, pool_timeout=60, connect_args={"check_same_thread": False}
    )
    made = Shop(engine, make_registry(engine))
    yield made
    made.stop()


def test_an_application_that_has_done_nothing(
    page: Browser, shop: Shop, make_watch: Callable[..., Watch]
) -> None:
    """The page shows that all is well, and asks for nothing but its own address."""
    watch = make_watch(shop.registry)
    with serving(watch.board(nothing)) as address:
        page.open(f"{address}/_db")
        page.wait_for("!document.querySelector('#verdict').hidden")
        assert "Connections are free" in page.text("#verdict")
        assert "0 of 5 in use" in page.text("#pools")
        assert "No connection is held." in page.text("#holders")
        assert f"pid {os.getpid()}" in page.text("header")
        assert "Each worker process has its own pool" in page.text("footer")
        look(page, "empty")
        page.click("#legend summary")
        page.wait_for("document.querySelector('#legend').open")
        look(page, "legend")

    # Chromium itself looks for an icon.
    paths = {request.removeprefix(address) for request in page.requests}
    assert paths <= {"/_db", "/favicon.ico"}
    assert page.errors == []


def test_an_exhausted_pool(page: Browser, shop: Shop, make_watch: Callable[..., Watch]) -> None:
    """Who is on call sees at once who holds, for how long, at which line, and who waits."""
    watch = make_watch(shop.registry, warn_after=0.2)
    for path in ("/", "/", "/nowhere", "/lost"):
        ask(shop.app, "GET", path)
    with serving(watch.board(nothing)) as address, ExitStack() as stack:
        page.open(f"{address}/_db")
        page.wait_for(f"{ROWS.format('ended')} === 5")

        with session_scope(shop.registry, name="careless"):
            left = stack.enter_context(shop.engine.connect())
        for path in ("/orders/1", "/orders/2", "/reports/7"):
            shop.start(path)
        stack.enter_context(shop.engine.connect())
        # Without a reload.
        page.wait_for(f"{ROWS.format('holders')} === 5")
        page.wait_for("document.querySelectorAll('#holders td.overdue').length === 3")
        assert "All connections are in use" in page.text("#verdict")
        shop.start("/products")
        page.wait_for(f"{ROWS.format('waiting')} === 1")
        page.wait_for("document.querySelector('#verdict').innerText.includes('waits')")

        assert "1 request waits for a connection" in page.text("#verdict")
        assert "5 of 5 in use" in page.text("#pools")
        assert "1 waiting" in page.text("#pools")
        assert page.evaluate("document.title") == f"5 held, 1 waiting: pid {os.getpid()}"
        states = page.evaluate(
            "[...document.querySelectorAll('#holders td.state')].map(each => each.innerText)"
        )
        assert sorted(states) == ["left over", "overdue", "overdue", "overdue", "running"]
        text_of_holders = page.text("#holders")
        for words in ("GET /orders/1", "GET /reports/7", "careless", "outside of a scope"):
            assert words in text_of_holders
        assert text_of_holders.index("careless") < text_of_holders.index("GET /orders/1")
        assert " in pay" in text_of_holders
        assert "1 retry since" in page.text("#ended")
        assert "attempt 2" in page.text("#ended")
        # Each state has a shape of its own too.
        shapes = page.evaluate(
            "[...new Set([...document.querySelectorAll('.cells use')]"
            ".map(each => each.getAttribute('href')))]"
        )
        assert sorted(shapes) == ["#s-over", "#s-overdue", "#s-running"]
        look(page, "exhausted")

        left.close()
        shop.stop()
        page.wait_for(f"{ROWS.format('holders')} === 1")
        page.wait_for("document.querySelector('#verdict').innerText.includes('without use')")
        look(page, "recovered")
    assert page.errors == []


def test_the_page_can_be_paused(
    page: Browser, shop: Shop, make_watch: Callable[..., Watch]
) -> None:
    """Nothing moves while somebody reads, until they click again."""
    watch = make_watch(shop.registry)
    with serving(watch.board(nothing)) as address, ExitStack() as stack:
        page.open(f"{address}/_db")
        page.wait_for("!document.querySelector('#verdict').hidden")
        page.click("#pause")
        page.wait_for("document.querySelector('#pause').innerText === 'Resume'")
        assert "paused" in page.text("#beat")
        stack.enter_context(shop.engine.connect())
        before = len(page.requests)
        # Longer than the page waits between two refreshes.
        page.evaluate("new Promise(done => setTimeout(done, 1500))")
        assert len(page.requests) <= before + 1  # one may have been on its way
        assert page.evaluate(ROWS.format("holders")) == 0
        page.click("#pause")
        page.wait_for(f"{ROWS.format('holders')} === 1")
        assert "live" in page.text("#beat")
    assert page.errors == []


def test_five_hundred_holders(
    page: Browser, make_engine: Callable[..., Engine], make_watch: Callable[..., Watch]
) -> None:
    """The longest twenty, and all of them after a click; the page stays usable."""
    engine = make_engine(pool_size=500, max_overflow=0)
    watch = make_watch(make_registry(engine), warn_after=0.1)
    with ExitStack() as stack, serving(watch.board(nothing)) as address:
        for _ in range(500):
            stack.enter_context(engine.connect())
        page.open(f"{address}/_db")
        page.wait_for(f"{ROWS.format('holders')} === 20")
        assert "500 of 500 in use" in page.text("#pools")
        look(page, "many")
        page.click("#holders .more button")
        page.wait_for(f"{ROWS.format('holders')} === 500")
        assert page.overflow() <= 0
        milliseconds = page.evaluate(
            "(() => { const start = performance.now(); draw();"
            "document.body.offsetHeight; return performance.now() - start; })()"
        )
        # Seconds would be too many even for a busy machine: the page does it once a second.
        assert milliseconds < 1000
        page.click("#holders .more button")
        page.wait_for(f"{ROWS.format('holders')} === 20")
    assert page.errors == []


def test_several_workers_are_told_apart(
    page: Browser, shop: Shop, make_watch: Callable[..., Watch]
) -> None:
    """Each answer comes from one process: the page stays with one, and a click shows another."""
    watch = make_watch(shop.registry)
    pids = [11, 22]

    def report() -> dict[str, Any]:
        pids.reverse()
        return {**watch._report(), "pid": pids[0]}

    with serving(Board(nothing, "/_db", lambda _: True, report)) as address:
        page.open(f"{address}/_db")
        page.wait_for("document.querySelectorAll('#workers button').length === 2")
        shown = page.evaluate("shown")
        other = 33 - shown
        assert f"Worker process {shown} on" in page.text("footer")
        look(page, "workers")
        number = "[...document.querySelectorAll('#workers button')].map(b => b.innerText)"
        position = page.evaluate(number).index(f"pid {other}") + 1
        page.click(f"#workers button:nth-of-type({position})")
        page.wait_for(f"shown === {other}")
        assert f"Worker process {other} on" in page.text("footer")
    assert page.errors == []


def test_a_server_that_is_gone_is_noticed(
    page: Browser, shop: Shop, make_watch: Callable[..., Watch]
) -> None:
    """The page does not go on showing old numbers as if they were new."""
    watch = make_watch(shop.registry)
    with serving(watch.board(nothing)) as address:
        page.open(f"{address}/_db")
        page.wait_for("!document.querySelector('#verdict').hidden")
    page.wait_for("document.querySelector('#beat').innerText.includes('no answer')")
    assert "The server does not answer" in page.text("#verdict")
    assert "free" not in page.text("#verdict")
    look(page, "gone")


def test_what_a_client_wrote_is_shown_as_text(
    page: Browser, shop: Shop, make_watch: Callable[..., Watch]
) -> None:
    """A path that looks like a script stays a path."""
    watch = make_watch(shop.registry)
    ask(shop.app, "GET", "/<img src=x onerror=document.title=1>")
    with serving(watch.board(nothing)) as address:
        page.open(f"{address}/_db")
        page.wait_for(f"{ROWS.format('ended')} === 1")
        assert "GET /<img src=x onerror=document.title=1>" in page.text("#ended")
        assert page.evaluate("document.querySelectorAll('img').length") == 0
    assert page.errors == []
