"""Part 4: many requests at once, and many after each other, in one process.

``python -m benchmarks.scale`` runs one of the measurements in a process of its own.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gevent
from gevent.event import Event
from sqlalchemy.orm import Session, sessionmaker

from benchmarks import children, report, timing
from benchmarks.applications import common
from benchmarks.applications.common import BY_HAND, OURS
from wsgi_dbsession import Scope, SessionMiddleware

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIEnvironment

WAITING = ("no middleware", "wsgi_dbsession, no Session used", "wsgi_dbsession, after a SELECT")


def measure(urls: dict[str, str], *, quick: bool) -> dict[str, Any]:
    """Return the memory of waiting requests, and samples of the memory of a long run."""
    waiting = {name: _run("wait", name, 200 if quick else 10_000) for name in WAITING}
    count = 20_000 if quick else 1_000_000
    run = {name: _run("run", name, count) for name in (BY_HAND, OURS)}
    return {"waiting": waiting, "run": run}


def _run(*arguments: object) -> Any:
    return children.run("benchmarks.scale", *arguments)


def render(results: dict[str, Any], directory: Path) -> str:
    waiting = results["waiting"]
    base = waiting[WAITING[0]]
    parts = [
        "## 4. Scale in one process\n",
        report.prose(f"""
            {base["count"]:,} greenlets, each in a response that waits for its next block (SQLite
            file, pool of 5, `commit_on="headers"`):
        """),
    ]
    rows = [
        [
            name,
            f"{found['bytes'] / found['count']:,.0f}",
            f"{(found['bytes'] - base['bytes']) / found['count']:+,.0f}",
            str(found["connections"]),
            f"{found['sessions']:,}",
            f"{found['left']:,}",
        ]
        for name, found in waiting.items()
    ]
    heads = ["", "bytes a request", "more", "connections held", "Sessions", "Sessions afterwards"]
    parts.append(report.table(heads, rows))
    run = results["run"]
    count = run[OURS]["count"]
    parts.append(
        report.prose(f"""
            {count:,} requests after each other, each with a Session, every hundredth with an
            INSERT into SQLite in memory, and the same by hand (garbage is collected before each
            look):
        """)
    )
    rows = []
    for by_hand, ours in zip(run[BY_HAND]["samples"], run[OURS]["samples"], strict=True):
        row = [f"{ours[0]:,}"]
        for number in (1, 2):
            row += [_amount(number, by_hand[number]), _amount(number, ours[number])]
        rows.append(row)
    heads = [
        "after requests",
        *("resident, by hand", f"resident, **{OURS}**"),
        *("blocks, by hand", f"blocks, **{OURS}**"),
    ]
    parts.append(report.table(heads, rows))
    rows = []
    for name, found in run.items():
        half = found["samples"][len(found["samples"]) // 2 :]
        rows.append(
            [
                name,
                f"{_slope([(requests, size) for requests, size, _ in half]):.2f}",
                f"{_slope([(requests, blocks) for requests, _, blocks in half]):.4f}",
                str(found["sessions"]),
                str(found["scopes"]),
            ]
        )
    heads = ["growth a request, second half", "bytes", "blocks", "Sessions left", "scopes left"]
    parts.append(report.table(heads, rows))
    return "\n".join(parts)


def _amount(number: int, value: int) -> str:
    return f"{value / 1e6:.1f} MB" if number == 1 else f"{value:,}"


def _slope(points: list[tuple[int, int]]) -> float:
    n = len(points)
    x_mean = sum(x for x, _ in points) / n
    y_mean = sum(y for _, y in points) / n
    over = sum((x - x_mean) * (y - y_mean) for x, y in points)
    return over / sum((x - x_mean) ** 2 for x, _ in points)


def resident() -> int:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        raise RuntimeError("the resident memory is read from /proc, which this system has not")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _alive(kind: type) -> int:
    return sum(isinstance(each, kind) for each in gc.get_objects())


def wait(name: str, count: int) -> dict[str, int]:
    """Hold as many responses open in greenlets of one thread, and look at the memory."""
    with tempfile.TemporaryDirectory() as directory:
        url = f"sqlite:///{directory}/wait.db"
        engine = common.make_engine(url, pool_size=5)
        registry = common.our_registry(engine)
        end = Event()
        begun = 0

        def application(
            environ: WSGIEnvironment, start_response: StartResponse
        ) -> Iterable[bytes]:
            if name == WAITING[2]:
                common.SELECT.call(registry)
            start_response("200 OK", common.PLAIN)
            return body()

        def body() -> Iterator[bytes]:
            nonlocal begun
            yield b"hello"
            begun += 1
            end.wait()
            yield b"bye"

        application_in_use: Any = application
        if name != WAITING[0]:
            application_in_use = SessionMiddleware(application, registry, commit_on="headers")
        warm = [gevent.spawn(timing.serve, application_in_use) for _ in range(20)]
        while begun < len(warm):
            gevent.sleep(0.01)
        end.set()
        gevent.joinall(warm, raise_error=True)
        end.clear()
        gc.collect()
        before = resident()
        greenlets = [gevent.spawn(timing.serve, application_in_use) for _ in range(count)]
        while begun < len(warm) + count:
            gevent.sleep(0.01)
        gc.collect()
        found = {
            "count": count,
            "bytes": resident() - before,
            "connections": engine.pool.checkedout(),  # type: ignore[attr-defined]
            "sessions": _alive(Session),
        }
        end.set()
        gevent.joinall(greenlets, raise_error=True)
        found["left"] = _alive(Session)
        return found


def run(name: str, count: int) -> dict[str, Any]:
    """Make as many requests, and look at the memory from time to time."""
    engine = common.make_engine("sqlite://")
    registry = common.our_registry(engine)
    factory = sessionmaker(engine)

    def work(environ: WSGIEnvironment, session: Any) -> None:
        if environ["PATH_INFO"] == "/insert":
            session.add(common.Note(text="hello"))

    def by_hand(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        with factory.begin() as session:
            work(environ, session)
        start_response("200 OK", common.SIZED)
        return [b"hello"]

    def ours(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        work(environ, registry())
        start_response("200 OK", common.SIZED)
        return [b"hello"]

    application: Any = by_hand if name == BY_HAND else SessionMiddleware(ours, registry)
    samples = []
    for number in range(1, count + 1):
        timing.serve(application, "/" if number % 100 else "/insert")
        if number % (count // 10) == 0:
            gc.collect()
            samples.append((number, resident(), sys.getallocatedblocks()))
    return {
        "count": count,
        "samples": samples,
        "sessions": _alive(Session),
        "scopes": _alive(Scope),
    }


def main(what: str, name: str, count: int) -> None:
    print(json.dumps(wait(name, count) if what == "wait" else run(name, count)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
