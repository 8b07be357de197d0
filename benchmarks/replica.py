"""Part 6: what a request takes with a network in between, and what a position costs."""

from __future__ import annotations

import functools
import statistics
from typing import TYPE_CHECKING, Any

from sqlalchemy import create_engine, make_url, text
from sqlalchemy.orm import scoped_session, sessionmaker

from benchmarks import report
from benchmarks.timing import interleave, serve
from tests.support.proxy import Proxy
from wsgi_dbsession import SessionMiddleware, current_scope
from wsgi_dbsession.replica import Replicas, read_only_engine, session_class

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from sqlalchemy import URL
    from sqlalchemy.orm import Session

ROUND_TRIP = 0.001  # seconds
SELECTS = (1, 5)
TRANSACTION, READ_ONLY = "in a transaction", "on a read-only engine"
PLAIN, POSITION = "COMMIT", "COMMIT and position"


def measure(urls: dict[str, str], *, quick: bool) -> dict[str, Any]:
    """Return the microseconds of requests: those that read, and those that write."""
    rounds, seconds = (3, 0.005) if quick else (30, 0.05)
    url = make_url(urls["PostgreSQL"])
    # The server listens on both, and a proxy needs TCP.
    port = int(str(url.query["port"]))
    url = url.set(host="127.0.0.1", port=port, query={})
    with Proxy.to(url, delay=ROUND_TRIP / 2) as proxy:
        reads = interleave(_reads(proxy.url(url)), rounds=rounds, seconds=seconds)
    writes = interleave(_writes(url), rounds=rounds, seconds=seconds)
    return {"reads": reads, "writes": writes}


def _reads(url: URL) -> dict[str, Callable[[], object]]:
    engine = create_engine(url)
    classes = {
        TRANSACTION: sessionmaker(engine),
        READ_ONLY: sessionmaker(class_=session_class(engine, read_only_engine(engine))),
    }
    return {
        f"{count} SELECT, {name}": functools.partial(serve, _application(maker, "SELECT 1", count))
        for count in SELECTS
        for name, maker in classes.items()
    }


def _writes(url: URL) -> dict[str, Callable[[], object]]:
    statement = "INSERT INTO note (text) VALUES ('hello')"
    plain = _application(sessionmaker(create_engine(url)), statement, 1)
    primary = create_engine(url)
    replicas = Replicas(
        primary, [primary], secret="only for a benchmark", when=lambda environ: False
    )
    wrapped = replicas.wrap(_application(sessionmaker(class_=replicas.Session), statement, 1))
    return {PLAIN: functools.partial(serve, plain), POSITION: functools.partial(serve, wrapped)}


def _application(maker: sessionmaker[Session], statement: str, count: int) -> WSGIApplication:
    registry = scoped_session(maker, scopefunc=current_scope)

    def application(_: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        for _number in range(count):
            registry.execute(text(statement))
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"hello"]

    return SessionMiddleware(application, registry)


def render(results: dict[str, Any], directory: Path) -> str:
    times = {
        name: statistics.median(found)
        for part in ("reads", "writes")
        for name, found in results[part].items()
    }
    lines = [
        [
            f"{count} SELECT" + "s" * (count > 1),
            *(
                f"{times[f'{count} SELECT, {name}'] / 1000:.2f}"
                for name in (TRANSACTION, READ_ONLY)
            ),
        ]
        for count in SELECTS
    ]
    more = times[POSITION] - times[PLAIN]
    return "\n".join(
        [
            "## 6. Reads over a network\n",
            report.prose(f"""
                A proxy delays each block between psycopg and PostgreSQL, so that a round trip
                takes {ROUND_TRIP * 1000:.0f} ms. The table has the milliseconds of a request in
                one process, without other clients.
            """),
            report.table(["a request with", TRANSACTION, f"**{READ_ONLY}**"], lines),
            report.prose(f"""
                Without the proxy, a request with one INSERT takes {times[PLAIN]:.0f} µs. With the
                position after its COMMIT and the signed cookie it takes {more:.0f} µs more.
            """),
        ]
    )
