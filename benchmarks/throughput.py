"""Part 3: requests a second and latency under gunicorn, with PostgreSQL."""

from __future__ import annotations

import contextlib
import statistics
from typing import TYPE_CHECKING, Any

from benchmarks import chart, load, report, servers
from benchmarks.applications.common import NONE, OURS
from benchmarks.applications.every import APPLICATIONS

if TYPE_CHECKING:
    from pathlib import Path

CLIENTS = 8


def measure(urls: dict[str, str], *, quick: bool) -> dict[str, Any]:
    """Load every application in turns, while the others' servers are idle."""
    workers = ["gthread"] if quick else list(servers.GUNICORN)
    peers = [
        (framework, peer)
        for framework, names in APPLICATIONS.items()
        for peer in names
        if peer != NONE and (not quick or (framework, peer) == ("Flask", OURS))
    ]
    found: dict[str, dict[str, dict[str, list[load.Load]]]] = {}
    failures: dict[str, str] = {}
    for worker in workers:
        with contextlib.ExitStack() as stack:
            running = {
                names: stack.enter_context(servers.serve(worker, *names, urls["PostgreSQL"]))
                for names in peers
            }
            rows = found[worker] = {}
            for turn in range(2 if quick else 4):
                for (framework, peer), server in running.items():
                    seen = load.load(server.port, "/both", clients=CLIENTS, seconds=1)
                    if turn:  # the first opens connections and fills caches
                        rows.setdefault(framework, {}).setdefault(peer, []).append(seen)
                    if seen.failed:
                        failures[f"{framework}: {peer}, {worker}"] = server.last_words()
    return {"generator": load.generator(), "workers": found, "failures": failures}


def render(results: dict[str, Any], directory: Path) -> str:
    parts = [
        "## 3. Throughput and latency\n",
        report.prose(f"""
            gunicorn with one worker (gthread: 8 threads), {CLIENTS} clients, load from
            {results["generator"]} on the same machine; each request is one INSERT, one SELECT and
            a COMMIT in PostgreSQL. All servers of a worker class run at the same time and are
            loaded in turns; medians of the turns. The ratio is to the first of the framework, in
            the same turn.
        """),
    ]
    bars: dict[str, dict[str, float]] = {}
    for worker, frameworks in results["workers"].items():
        rows = []
        for framework, peers in frameworks.items():
            base = next(iter(peers.values()))
            for peer, seen in peers.items():
                per_second, p50, p99, failed = map(statistics.median, zip(*seen, strict=True))
                ratio = statistics.median(
                    one[0] / other[0] for one, other in zip(seen, base, strict=True)
                )
                name = f"**{peer}**" if peer == OURS else peer
                rows.append(
                    [
                        f"{framework}: {name}",
                        f"{per_second:,.0f}" + (f" ({failed:.0%} errors)" if failed else ""),
                        report.percent(ratio),
                        f"{p50:.2f}",
                        f"{p99:.2f}",
                    ]
                )
                bars.setdefault(f"{framework}, {worker}", {})[peer] = per_second
        heads = [f"gunicorn, {worker}", "requests/s", "ratio", "p50, ms", "p99, ms"]
        parts.append(report.table(heads, rows))
    title = "Requests a second under gunicorn, one INSERT and one SELECT each"
    chart.bars(directory / "throughput.svg", title, "requests a second", bars)
    parts.append(f"![{title}](throughput.svg)\n")
    parts += [
        f"{name} answered with errors, the last of which was `{reason}`.\n"
        for name, reason in results["failures"].items()
    ]
    return "\n".join(parts)
