"""Part 5: what grows with the length of a stream, and with the number of registries."""

from __future__ import annotations

import functools
import statistics
from typing import TYPE_CHECKING, Any

from benchmarks import chart, report
from benchmarks.applications.common import (
    NONE,
    OURS,
    PLAIN,
    SIZED,
    blocks,
    make_engine,
    our_registry,
)
from benchmarks.timing import difference, interleave, serve
from wsgi_dbsession import SessionMiddleware

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

LENGTHS = (10, 100, 1_000, 10_000)
REGISTRIES = (1, 2, 4, 8, 16)


def measure(urls: dict[str, str], *, quick: bool) -> dict[str, Any]:
    rounds, seconds = (3, 0.001) if quick else (40, 0.01)
    engine = make_engine("sqlite://")
    lengths = LENGTHS[:3] if quick else LENGTHS
    streams: dict[str, dict[str, list[float]]] = {}
    for length in lengths:
        application = _stream(length)
        middleware = SessionMiddleware(application, our_registry(engine))
        calls = {
            NONE: functools.partial(serve, application),
            OURS: functools.partial(serve, middleware),
        }
        streams[str(length)] = interleave(calls, rounds=rounds, seconds=seconds)
    unused = {NONE: functools.partial(serve, _list())}
    used = {}
    for number in REGISTRIES:
        registries = [our_registry(engine) for _ in range(number)]
        unused[str(number)] = functools.partial(serve, SessionMiddleware(_list(), *registries))
        used[str(number)] = functools.partial(
            serve, SessionMiddleware(_list(*registries), *registries)
        )
    return {
        "streams": streams,
        "unused": interleave(unused, rounds=rounds, seconds=seconds),
        "used": interleave(used, rounds=rounds, seconds=seconds),
    }


def _stream(length: int) -> WSGIApplication:
    def application(_: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", PLAIN)
        return blocks("hello", length)

    return application


def _list(*registries: Any) -> WSGIApplication:
    def application(_: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        for registry in registries:
            registry()
        start_response("200 OK", SIZED)
        return [b"hello"]

    return application


def render(results: dict[str, Any], directory: Path) -> str:
    parts = ["## 5. Growth\n", "Per block of a stream, by its length:\n"]
    rows, per_block = [], []
    for length, times in results["streams"].items():
        more = difference(times[OURS], times[NONE]) * 1000 / int(length)
        per_block.append(more)
        none, ours = (statistics.median(times[name]) * 1000 / int(length) for name in (NONE, OURS))
        rows.append([f"{int(length):,}", f"{none:.0f}", f"{ours:.0f}", f"{more:+.0f}"])
    parts.append(report.table(["blocks", "no middleware, ns", f"{OURS}, ns", "more"], rows))
    chart.lines(
        directory / "growth.svg",
        "Price of a block, by the length of the stream",
        "ns more than without middleware",
        list(results["streams"]),
        "blocks of the stream",
        {OURS: per_block},
    )
    parts.append("![Price of a block, by the length of the stream](growth.svg)\n")
    parts.append(
        report.prose("""
            By the number of registries, no Session used, and a Session of each made and closed:
        """)
    )
    rows = []
    for number in (name for name in results["unused"] if name != NONE):
        more = difference(results["unused"][number], results["unused"][NONE])
        used = statistics.median(results["used"][number])
        rows.append([number, f"{more:+.2f}", f"{used:.2f}", f"{used / int(number):.2f}"])
    heads = ["registries", "none used, µs more", "all used, µs", "per registry"]
    parts.append(report.table(heads, rows))
    return "\n".join(parts)
