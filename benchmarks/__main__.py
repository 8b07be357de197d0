"""Run all parts, or some, and write the report."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from benchmarks import bars, growth, held, overhead, replica, report, rules, scale, throughput
from benchmarks.applications.common import make_engine, prepare_database
from tests.support import postgres

PARTS: dict[str, Any] = {
    "bars": bars,
    "rules": rules,
    "overhead": overhead,
    "held": held,
    "throughput": throughput,
    "scale": scale,
    "growth": growth,
    "replica": replica,
}
HERE = Path(__file__).parent
# Ignored by git: what a quick or a partial run writes, and the raw numbers of every run.
BUILD = HERE.parent / "build" / "benchmarks"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only see that everything runs")
    parser.add_argument("--render", action="store_true", help="the last run's numbers once more")
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="all, if none is named")
    arguments = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    raw = BUILD / "results.json"
    if arguments.render:
        results = json.loads(raw.read_text())
    else:
        results = measure(arguments.parts or list(PARTS), quick=arguments.quick)
        raw.write_text(json.dumps(results))
    whole = not results["quick"] and set(results["parts"]) == set(PARTS)
    directory = HERE if whole else BUILD
    path = directory / "RESULTS.md"
    path.write_text(render(results, directory))
    print(f"wrote {path}")


def measure(parts: list[str], *, quick: bool) -> dict[str, Any]:
    results: dict[str, Any] = {
        "quick": quick,
        "date": report.now(),
        "commit": report.commit(),
        "machine": report.machine(),
        "versions": report.versions(),
        "parts": {},
    }
    run = postgres.Run()
    try:
        server = postgres.server(run.directory)
        server.create_database("benchmarks")
        url = server.url("benchmarks", unix_socket=True)
        prepare_database(make_engine(url.render_as_string(hide_password=False)))
        urls = {"SQLite": "sqlite://", "PostgreSQL": url.render_as_string(hide_password=False)}
        with server.connect("benchmarks") as connection:
            results["versions"] += f", PostgreSQL {connection.info.server_version // 10000}"
        for name in parts:
            start = time.monotonic()
            results["parts"][name] = PARTS[name].measure(urls, quick=quick)
            print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    finally:
        run.end()
    return results


def render(results: dict[str, Any], directory: Path) -> str:
    parts = [
        "# Benchmarks\n",
        report.prose("""
            Written by `make bench`: do not edit. Everything below was measured in one run on one
            machine, so the ratios can be compared; the absolute numbers cannot be taken to
            another machine.
        """),
    ]
    if results["quick"]:
        parts.append("**A quick run: these numbers mean nothing.**\n")
    parts.append(
        f"- {results['date']}, commit {results['commit']}\n"
        f"- {results['machine']}\n"
        f"- {results['versions']}\n"
    )
    parts += [PARTS[name].render(found, directory) for name, found in results["parts"].items()]
    return "\n".join(parts)


if __name__ == "__main__":
    main()
