"""Two hundred streams, and slow requests, over a pool of five connections, while others get on."""

from __future__ import annotations

import contextlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.browser import Browser, find_chromium

from .client import Connection
from .fleet import SERVERS, Running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .conftest import Observer

pytestmark = [pytest.mark.promise("servers", "no connection held")]

STREAMS = 200
POOL = 5
TIMEOUT = 90  # seconds after which something has failed, not how long anything takes
PLACE = Path(__file__).parent / "streaming"
OPTIONS = {"gunicorn gthread": ["--threads", "256"], "gunicorn gevent": []}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(server, marks=pytest.mark.xdist_group(server.name), id=server.name)
        for server in SERVERS
        if server.name in OPTIONS and server.missing() is None
    ],
)
def streaming(
    request: pytest.FixtureRequest, observer: Observer, database_url: str
) -> Iterator[Running]:
    """Run gunicorn with threads enough, or with greenlets."""
    options = OPTIONS[request.param.name]
    started = Running(request.param, database_url, *options, place=PLACE)
    yield started
    started.stop()


def state(running: Running, below: str = "") -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(running.fetch(f"{below}/state", timeout=TIMEOUT).body)
    return loaded


def wait_until(condition: Callable[[], bool], running: Running) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, running.log()
        time.sleep(0.1)


class Stream:
    """A client of a stream of events."""

    def __init__(self, running: Running, path: str) -> None:
        self._connection = Connection(running.port, timeout=TIMEOUT)
        self._connection.send(path, headers=["Accept: text/event-stream"])
        self._seen = b""

    def wait_for(self, count: int) -> None:
        """Read until an event has this number."""
        while f"data: {count}\n\n".encode() not in self._seen:
            block = self._connection.socket.recv(1 << 16)
            assert block, self._seen
            self._seen += block

    def close(self) -> None:
        """Leave, without a word to the server."""
        self._connection.abort()


class BrowserStream:
    """The same with an ``EventSource`` in a browser."""

    def __init__(self, running: Running, token: str, browser: Browser) -> None:
        self._browser = browser
        browser.open(f"http://127.0.0.1:{running.port}/page?run={token}")

    def wait_for(self, count: int) -> None:
        """Wait until the page shows an event with this number."""
        self._browser.wait_for(f"document.querySelector('#count').textContent === '{count}'")
        assert self._browser.evaluate("source.readyState") == 1
        assert self._browser.errors == []

    def close(self) -> None:
        """Leave."""
        self._browser.evaluate("source.close()")


@contextlib.contextmanager
def open_streams(
    running: Running, path: str, count: int, *others: BrowserStream
) -> Iterator[list[Stream | BrowserStream]]:
    """Open streams, and wait for the first event of each; they are gone afterwards."""
    streams: list[Stream | BrowserStream] = [*others]
    streams += [Stream(running, path) for _ in range(count - len(others))]
    try:
        for stream in streams:
            stream.wait_for(0)
        yield streams
    finally:
        for stream in streams:
            stream.close()


@pytest.fixture(params=["sockets only", "a browser among them"])
def browsers(
    request: pytest.FixtureRequest, streaming: Running, token: str
) -> Iterator[list[BrowserStream]]:
    """No browser, or one that has opened its stream."""
    if request.param == "sockets only":
        yield []
        return
    if find_chromium() is None:
        pytest.skip("NOT RUN: no Chromium is installed")
    with Browser(timeout=TIMEOUT) as browser:
        yield [BrowserStream(streaming, token, browser)]


def test_two_hundred_streams_hold_no_connection(
    streaming: Running, observer: Observer, token: str, browsers: list[BrowserStream]
) -> None:
    """All get all events, one of them a browser's EventSource, and others write meanwhile."""

    def add(number: int) -> str:
        return streaming.fetch(f"/add?token={token}{number}", timeout=TIMEOUT).kind

    idle = {"connections": 0, "streams": STREAMS}
    with open_streams(streaming, f"/events?run={token}", STREAMS, *browsers) as streams:
        observer.wait_idle(streaming)
        wait_until(lambda: state(streaming) == idle, streaming)

        with ThreadPoolExecutor(10) as executor:
            answers = list(executor.map(add, range(20)))

        assert answers == ["200"] * 20, streaming.log()
        for stream in streams:
            stream.wait_for(20)
        observer.wait_idle(streaming)
        wait_until(lambda: state(streaming) == idle, streaming)

    def have_left() -> bool:
        streaming.fetch("/wake", timeout=TIMEOUT)
        return state(streaming) == {"connections": 0, "streams": 0}

    wait_until(have_left, streaming)
    observer.wait_idle(streaming)
    assert "Traceback" not in streaming.log()


def test_streams_that_hold_exhaust_the_pool(
    streaming: Running, observer: Observer, token: str
) -> None:
    """With ``commit_on="complete"``, so the test above can fail: five streams, and no more."""
    with open_streams(streaming, f"/held/events?run={token}", POOL):
        assert state(streaming, "/held") == {"connections": POOL, "streams": POOL}
        assert len(observer.busy(streaming)) == POOL

        refused = streaming.fetch(f"/held/add?token={token}", timeout=TIMEOUT)

        assert refused.kind == "500"
        assert "QueuePool limit of size 5 overflow 0 reached" in streaming.log()

    def have_left() -> bool:
        streaming.fetch("/held/wake", timeout=TIMEOUT)
        return state(streaming, "/held") == {"connections": 0, "streams": 0}

    wait_until(have_left, streaming)
    observer.wait_idle(streaming)


@pytest.mark.promise("released")
def test_slow_requests_hold_no_connection(
    streaming: Running, observer: Observer, token: str
) -> None:
    """Fifty wait until the last of them is there, in ``released()``, and all are committed."""
    slow = 50

    def wait(number: int) -> bytes:
        path = f"/wait?run={token}&token={token}{number}&among={slow}"
        answer = streaming.fetch(path, timeout=TIMEOUT)
        assert answer.kind == "200", streaming.log()
        return answer.body

    with ThreadPoolExecutor(slow) as executor:
        answers = list(executor.map(wait, range(slow)))

    assert answers == [b"0, True"] * slow
    assert all(observer.saved(f"{token}{number}") for number in range(slow))
    observer.wait_idle(streaming)
