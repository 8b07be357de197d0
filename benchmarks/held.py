"""Part 2: what the other clients get while slow ones read, with a pool of five connections."""

from __future__ import annotations

import contextlib
import statistics
from typing import TYPE_CHECKING, Any

from benchmarks import chart, report, servers
from benchmarks.applications.common import BY_HAND, NONE, OURS
from benchmarks.applications.every import APPLICATIONS, VARIANTS
from benchmarks.load import own_load, slow_readers

if TYPE_CHECKING:
    from pathlib import Path

POOL_SIZE = 5
CLIENTS = 8
BODIES = {"a finished body of 1 MB": "/big", "a stream of 1 MB": "/big-stream"}


def measure(urls: dict[str, str], *, quick: bool) -> dict[str, Any]:
    """Return the requests a second of the others, by body, application and slow readers.

    The applications are loaded in turns, so that what disturbs the machine disturbs all of them.
    """
    counts = [0, 20] if quick else [0, 50, 1000]
    bodies = list(BODIES)[:1] if quick else list(BODIES)
    names = [("bare WSGI", OURS)] if quick else _peers()
    found: dict[str, dict[str, list[list[float]]]] = {}
    failures: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        peers = [Peer(*name, urls["PostgreSQL"]) for name in names]
        for peer in peers:
            stack.callback(peer.close)
        for body in bodies:
            cells: dict[tuple[str, int], list[tuple[int, float]]] = {}
            for _ in range(1 if quick else 3):
                for count in counts:
                    for peer in peers:
                        cell = cells.setdefault((peer.name, count), [])
                        if not cell or cell[-1][0] == count:  # else it would only wait again
                            cell.append(peer.load(BODIES[body], count))
            found[body] = {
                peer.name: [_median(cells[peer.name, count]) for count in counts] for peer in peers
            }
        for peer in peers:
            if peer.failure is not None:
                failures[peer.name] = peer.failure
    return {"counts": counts, "bodies": found, "failures": failures}


def _median(cell: list[tuple[int, float]]) -> list[float]:
    answered = min(answered for answered, _ in cell)
    return [answered, statistics.median(per_second for _, per_second in cell)]


class Peer:
    """A server with one of the applications, until it is left in a bad state."""

    def __init__(self, framework: str, peer: str, url: str) -> None:
        self.name = f"{peer} ({framework})"
        self.failure: str | None = None
        self._arguments = ("pywsgi", framework, peer, url)
        self._stack = contextlib.ExitStack()
        self._server: servers.Server | None = None

    def close(self) -> None:
        self._server = None
        self._stack.close()

    def load(self, path: str, count: int) -> tuple[int, float]:
        """Return how many slow readers are answered, and the requests a second of the others."""
        if self._server is None:
            self._server = self._stack.enter_context(
                servers.serve(*self._arguments, pool_size=POOL_SIZE)
            )
            own_load(self._server.port, "/select", clients=CLIENTS, seconds=0.3)  # to warm it up
        with slow_readers(self._server.port, path, count) as answered:
            seen = own_load(self._server.port, "/select", clients=CLIENTS, seconds=0.8)
        if seen.failed:
            self.failure = self._server.last_words()
        if answered < count:
            # Some do not recover from clients that went away: each gets a new start.
            self.close()
        return answered, seen.per_second


def _peers() -> list[tuple[str, str]]:
    peers = [("bare WSGI", OURS), *(("bare WSGI", peer) for peer in VARIANTS["bare WSGI"])]
    for framework, names in APPLICATIONS.items():
        for peer in names:
            # The hand-written ones do the same in every framework.
            if peer not in (NONE, OURS) and (peer != BY_HAND or framework == "bare WSGI"):
                peers.append((framework, peer))
    return peers


def render(results: dict[str, Any], directory: Path) -> str:
    counts: list[int] = results["counts"]
    parts = [
        "## 2. Connections held while slow clients read\n",
        report.prose(f"""
            gevent.pywsgi with a pool of {POOL_SIZE} connections to PostgreSQL. Each slow reader
            has asked for a response for which the view ran a SELECT, and reads 1 KB twice a
            second. Meanwhile {CLIENTS} other clients ask for a SELECT as quickly as they are
            answered: the table has the successful requests a second that these get in all, and
            in brackets how many of the slow readers have the beginning of their answer. The
            applications are loaded in turns, and each number is the median of three loads, or of
            as many as there were until slow readers got no answer.
        """),
        report.prose("""
            An application that ends its transaction when the response is closed holds a
            connection for every slow reader. A stream may still need its Session while it runs,
            so its transaction lasts until it is exhausted, unless `commit_on="headers"` says that
            what it does after its start is a transaction of its own. The peers that stay quick
            with streams have committed, or closed the Session, before the stream runs.
        """),
    ]
    for index, (body, rows) in enumerate(results["bodies"].items()):
        heads = [f"slow readers of {body}", *map(str, counts)]
        lines = []
        for name, row in rows.items():
            shown = f"**{name}**" if name.startswith(OURS) else name
            cells = [f"{row[0][1]:,.0f}"]
            cells += [f"{per_second:,.0f} ({answered:,.0f})" for answered, per_second in row[1:]]
            lines.append([shown, *cells])
        parts.append(report.table(heads, lines))
        name = f"held-{('list', 'stream')[index]}.svg"
        title = f"Requests a second of the others, while slow clients read {body}"
        chart.lines(
            directory / name,
            title,
            f"per cent of what they get without slow readers, pool of {POOL_SIZE}",
            [str(count) for count in counts],
            "slow readers",
            {
                name: [cell[1] / row[0][1] * 100 for cell in row]
                for name, row in rows.items()
                if row[0][1]  # else not one of three loads was answered, and there is no share
            },
        )
        parts.append(f"![{title}]({name})\n")
    parts += [
        f"{name} also answered with errors, the last of which was `{reason}`.\n"
        for name, reason in results["failures"].items()
    ]
    return "\n".join(parts)
