"""Part 1: what a request costs, in one process, without sockets."""

from __future__ import annotations

import copy
import functools
import statistics
from typing import TYPE_CHECKING, Any

from benchmarks import chart, report
from benchmarks.applications.common import BY_HAND, NONE, OURS, make_engine
from benchmarks.applications.every import APPLICATIONS, make_application
from benchmarks.timing import check, difference, interleave, ratio, serve
from wsgi_dbsession import SessionMiddleware
from wsgi_dbsession.retry import RetryMiddleware

if TYPE_CHECKING:
    from pathlib import Path

    from _typeshed.wsgi import WSGIApplication

RETRY = f"RetryMiddleware around {OURS}"
BODIES = {
    "list": "/",
    "iterable of one block": "/sized",
    "stream of 100 blocks": "/stream",
}
WORK = {
    "SELECT": "/select",
    "INSERT, COMMIT": "/insert",
}
SELECT_BODIES = {
    "SELECT, iterable of one block": "/select-sized",
    "SELECT, stream of 100 blocks": "/select-stream",
}

Times = dict[str, list[float]]


def measure(urls: dict[str, str], *, quick: bool) -> dict[str, Any]:
    """Time every application with every piece of work."""
    rounds, seconds = (5, 0.001) if quick else (50, 0.012)
    bare: dict[str, Times] = {}
    frameworks: dict[str, dict[str, Times]] = {}
    for framework in APPLICATIONS:
        found = frameworks[framework] = {}
        for database, url in urls.items():
            applications = _make(framework, url)
            if not found:
                bodies = BODIES if framework == "bare WSGI" else {"no Session used": "/"}
                for body, path in bodies.items():
                    calls = {
                        peer: functools.partial(serve, application, path)
                        for peer, application in applications.items()
                        # Where no Session is used, this is the application without one.
                        if peer != BY_HAND
                    }
                    if framework == "bare WSGI":
                        ours = applications[OURS]
                        assert isinstance(ours, SessionMiddleware)
                        # A copy: the retry adds an observer to it.
                        retry = RetryMiddleware(copy.copy(ours))
                        calls[RETRY] = functools.partial(serve, retry, path)
                    found[body] = interleave(calls, rounds=rounds, seconds=seconds)
            work = WORK | (SELECT_BODIES if framework == "bare WSGI" else {})
            for name, path in work.items():
                calls = {
                    peer: functools.partial(serve, application, path)
                    for peer, application in applications.items()
                    if peer != NONE
                }
                found[f"{name}, {database}"] = interleave(calls, rounds=rounds, seconds=seconds)
    bare = frameworks.pop("bare WSGI")
    return {"bare": bare, "frameworks": frameworks}


def _make(framework: str, url: str) -> dict[str, WSGIApplication]:
    applications = {}
    for peer in APPLICATIONS[framework]:
        application = make_application(framework, peer, make_engine(url))
        check(application, database=peer != NONE)
        applications[peer] = application
    return applications


def render(results: dict[str, Any], directory: Path) -> str:
    bare: dict[str, Times] = results["bare"]
    frameworks: dict[str, dict[str, Times]] = results["frameworks"]
    empty = statistics.median(bare["list"][NONE])
    parts = [
        "## 1. Overhead of a request\n",
        report.prose(f"""
            In one process, without sockets: a fresh environ, the call, the iteration, `close()`.
            The unit of the last column is the *empty call*: such a request to a bare WSGI
            application that returns a list, without anything around it. It took
            **{empty:.2f} µs** here. All applications of a table are timed in turns, round by
            round; each number is the median over the rounds, and differences and ratios are made
            within a round.
        """),
        "### No Session used\n",
    ]
    rows = []
    for body in BODIES:
        for peer, times in bare[body].items():
            if peer == NONE:
                rows.append([f"**{body}**: {peer}", _time(times), "", ""])
                continue
            more = difference(times, bare[body][NONE])
            rows.append(
                [f"{body}: {_ours(peer)}", _time(times), f"{more:+.2f}", f"{more / empty:.1f}"]
            )
    parts.append(report.table(["bare WSGI", "µs", "more than none", "in empty calls"], rows))
    rows = []
    for framework, found in frameworks.items():
        base = found["no Session used"][NONE]
        for peer, times in found["no Session used"].items():
            if peer == NONE:
                rows.append([f"**{framework}**", _time(times), "", ""])
                continue
            more = difference(times, base)
            rows.append(
                [
                    f"{framework}: {_ours(peer)}",
                    _time(times),
                    f"{more:+.2f}",
                    f"{more / empty:.1f}",
                ]
            )
    parts.append(report.table(["frameworks", "µs", "more than none", "in empty calls"], rows))

    parts.append("### With a database\n")
    parts.append(
        report.prose("""
            The limit is the hand-written `with Session.begin():` in the view; the other columns
            say how much longer the request takes. PostgreSQL is reached by a Unix socket, and
            does not wait for the disk, which makes every overhead look larger than it is in a
            data centre. The views of the thread-local registry, Flask-SQLAlchemy and
            Flask-SQLAlchemy-Lite do not commit a SELECT, as their documentation has it: the
            connection's rollback costs SQLAlchemy less than a Session's commit.
        """)
    )
    for framework, found in {"bare WSGI": bare, **frameworks}.items():
        works = [work for work in found if BY_HAND in found[work]]
        peers = list(found[works[0]])
        rows = []
        for work in works:
            base = found[work][BY_HAND]
            cells = [_time(base)]
            for peer in peers:
                if peer != BY_HAND:
                    cells.append(report.percent(ratio(found[work][peer], base)))
            rows.append([work, *cells])
        heads = [framework, f"{BY_HAND}, µs", *[_ours(peer) for peer in peers if peer != BY_HAND]]
        parts.append(report.table(heads, rows))
    parts.append(_plot(results, directory))
    return "\n".join(parts)


def _plot(results: dict[str, Any], directory: Path) -> str:
    bars = {}
    found: dict[str, Times]
    for framework, found in {"bare WSGI": results["bare"], **results["frameworks"]}.items():
        work = next(iter(found))
        base = found[work][NONE]
        bars[framework] = {
            peer: difference(times, base) for peer, times in found[work].items() if peer != NONE
        }
    chart.bars(
        directory / "overhead.svg",
        "Overhead of a request that uses no Session",
        "µs more than the same application without Sessions",
        bars,
        limit=40,
    )
    return "![Overhead of a request that uses no Session](overhead.svg)\n"


def _time(times: list[float]) -> str:
    return f"{statistics.median(times):.2f}"


def _ours(peer: str) -> str:
    return f"**{peer}**" if peer == OURS else peer
