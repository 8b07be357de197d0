"""What a server does for a request, and a clock around it."""

from __future__ import annotations

import gc
import io
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from _typeshed.wsgi import WSGIApplication

ENVIRON: dict[str, Any] = {
    "REQUEST_METHOD": "GET",
    "SCRIPT_NAME": "",
    "PATH_INFO": "/",
    "QUERY_STRING": "",
    "RAW_URI": "/",
    "SERVER_NAME": "127.0.0.1",
    "SERVER_PORT": "8000",
    "SERVER_PROTOCOL": "HTTP/1.1",
    "SERVER_SOFTWARE": "benchmark",
    "REMOTE_ADDR": "127.0.0.1",
    "REMOTE_PORT": "50000",
    "HTTP_HOST": "127.0.0.1:8000",
    "HTTP_USER_AGENT": "benchmark",
    "HTTP_ACCEPT": "*/*",
    "wsgi.version": (1, 0),
    "wsgi.url_scheme": "http",
    "wsgi.errors": sys.stderr,
    "wsgi.multithread": True,
    "wsgi.multiprocess": False,
    "wsgi.run_once": False,
}


class Request:
    """What a server keeps of one request, less the socket."""

    __slots__ = ("headers", "sent", "status")

    def __init__(self) -> None:
        self.status: str | None = None
        self.headers: list[tuple[str, str]] = []
        self.sent: list[bytes] = []

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None, /
    ) -> Callable[[bytes], object]:
        if self.status is not None and exc_info is None:
            raise AssertionError("start_response was called twice")
        self.status = status
        self.headers = headers
        return self.write

    def write(self, block: bytes, /) -> None:
        self.sent.append(block)


def serve(application: WSGIApplication, path: str = "/") -> Request:
    """Do for one request what a server does, with everything fresh that is fresh there."""
    environ = ENVIRON.copy()
    environ["PATH_INFO"] = path
    environ["wsgi.input"] = io.BytesIO(b"")
    request = Request()
    iterable = application(environ, request.start_response)
    try:
        for block in iterable:
            request.write(block)
    finally:
        close = getattr(iterable, "close", None)
        if close is not None:
            close()
    return request


def fetch(application: WSGIApplication, path: str) -> bytes:
    """Return the body of a response that is what it should be: a failing one can be quick."""
    request = serve(application, path)
    body = b"".join(request.sent)
    if request.status is None or not request.status.startswith("200"):
        raise RuntimeError(f"{path} answered {request.status}: {body[:500]!r}")
    return body


def check(application: WSGIApplication, *, database: bool) -> None:
    """Raise unless the application answers, reads and commits."""
    paths = ["/", "/stream", *(["/select", "/insert", "/both"] if database else [])]
    before = int(fetch(application, "/count")) if database else 0
    for path in paths:
        if not fetch(application, path).startswith(b"hello"):
            raise RuntimeError(f"{path} did not say hello")
    if database and int(fetch(application, "/count")) != before + 2:
        raise RuntimeError("what was inserted was not committed")


def interleave(
    calls: Mapping[str, Callable[[], object]], *, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Time each call in every round, so that what disturbs the machine disturbs all of them.

    :param seconds: how long one call is repeated in one round, about.
    :return: of each call the microseconds that one took, round by round.
    """
    repetitions = {name: _repetitions(call, seconds) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.freeze()
    for turn in range(rounds):
        # Each goes first as often as any other.
        names = list(calls)
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            call, count = calls[name], repetitions[name]
            start = time.perf_counter_ns()
            for _ in range(count):
                call()
            times[name].append((time.perf_counter_ns() - start) / count / 1000)
    gc.unfreeze()
    return times


def _repetitions(call: Callable[[], object], seconds: float) -> int:
    for _ in range(20):  # caches fill, the interpreter specialises
        call()
    start = time.perf_counter()
    count = 0
    while time.perf_counter() - start < seconds:
        call()
        count += 1
    return max(count, 1)


def difference(times: list[float], base: list[float]) -> float:
    """Return how much longer than `base` it took, in the middle one of the rounds."""
    return statistics.median(one - other for one, other in zip(times, base, strict=True))


def ratio(times: list[float], base: list[float]) -> float:
    """Return how many times longer than `base` it took, in the middle one of the rounds."""
    return statistics.median(one / other for one, other in zip(times, base, strict=True))
