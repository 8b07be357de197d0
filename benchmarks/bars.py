"""Part 0: the bars, each judged by something that repeats."""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING, Any

from benchmarks import children, editions, instructions, report
from benchmarks.applications.common import OURS, make_engine
from benchmarks.applications.every import make_application
from benchmarks.instructions import FURTHER_BLOCK, ROWS, WATCHED_ROWS
from benchmarks.scale import WAITING
from benchmarks.timing import serve

if TYPE_CHECKING:
    from pathlib import Path

CYCLES = "cyclic objects left by {:,} requests"
WAITING_BYTES = "bytes of a request that waits, no Session used"
BARS = {
    **{row.name: row.bar for row in ROWS[:3]},
    FURTHER_BLOCK.name: FURTHER_BLOCK.bar,
    **{row.name: row.bar for row in (*ROWS[3:], *WATCHED_ROWS)},
    CYCLES: 0,
    WAITING_BYTES: 1950,
}
# What the design asked for, see `render`.
DESIGN = {
    **{row.name: row.design for row in (*ROWS, FURTHER_BLOCK, *WATCHED_ROWS)},
    CYCLES: 0,
    WAITING_BYTES: 1750,
}
PERCENT = {row.name for row in WATCHED_ROWS}
PATHS = ("/", "/sized", "/select", "/insert")


def measure(urls: dict[str, str], *, quick: bool) -> dict[str, Any]:
    """Measure both editions, each in processes of its own."""
    requests, waiting = (1_000, 200) if quick else (10_000, 10_000)
    results: dict[str, Any] = {"requests": requests, "found": {}, "base": {}, "skipped": None}
    with editions.directories() as directories:
        for edition, directory in directories.items():
            cycles = children.run("benchmarks.bars", requests, directory=directory)
            none, ours = (
                children.run("benchmarks.scale", "wait", name, waiting, directory=directory)
                for name in WAITING[:2]
            )
            results["found"][edition] = {
                CYCLES: cycles,
                WAITING_BYTES: (ours["bytes"] - none["bytes"]) / waiting,
            }
        try:
            counts = instructions.measure(directories, quick=quick)
        except instructions.ValgrindError as error:
            report.warn(f"no instructions are counted: {error}")
            results["skipped"] = str(error)
            return results
    for edition, rows in counts.items():
        for name, count in rows.items():
            results["found"][edition][name] = count.more
            results["base"][name] = count.base  # at last, that of this edition
    return results


def render(results: dict[str, Any], directory: Path) -> str:
    """Write the bars, what was measured, and whether it is below them."""
    found, base = results["found"], results["base"]
    rows = []
    for name, bar in BARS.items():
        this = found[editions.THIS].get(name)
        first = found.get(editions.FIRST, {}).get(name)
        instructions_are_counted = name not in (CYCLES, WAITING_BYTES)
        shown = "{:+.1f}" if instructions_are_counted else "{:,.0f}"
        most, design = f"{bar:,}", f"{DESIGN[name]:,}"
        if name in PERCENT and name in base:
            percent, bar = bar, bar * base[name] / 100
            most, design = f"{percent} %: {bar:.1f}", f"{percent} %"
        kept = "not measured" if this is None else "yes" if this <= bar else "**no**"
        rows.append(
            [
                name.format(results["requests"]),
                f"{base[name]:.1f}" if name in base else "",
                "" if first is None else shown.format(first),
                "" if this is None else shown.format(this),
                design,
                most,
                kept,
            ]
        )
    parts = [
        "## Bars\n",
        report.prose(f"""
            Thousand instructions that a request needs more than the same application without
            Sessions, or more than a hand-written `with Session.begin():` where it uses one,
            counted by `valgrind --tool=callgrind` with SQLite in memory while the garbage
            collector is off. Instructions are not time, but they do not depend on what else the
            machine does. Lookups that miss CPython's cache of attributes, which is chance, are
            left out. What is watched, by `wsgi_dbsession.watch` with `warn_after`, is compared
            with the same that is not. The first edition is the package at commit
            `{editions.FIRST_COMMIT}`, measured in the same run.
        """),
    ]
    parts.append(
        report.prose("""
            *Design* is what the design asked for, after a throw-away trial. "At most" is what
            this core is held to. The next table shows what its rules cost, and that the numbers
            of the design are out of its reach even without these rules.
        """)
    )
    if results["skipped"]:
        parts.append(f"**No instructions were counted: {results['skipped']}.**\n")
    heads = ["", "without", "first edition", "now", "design", "at most", "kept"]
    parts.append(report.table(heads, rows))
    return "\n".join(parts)


def count_cycles(requests: int) -> int:
    """Return how many objects only the garbage collector could free."""
    application = make_application("bare WSGI", OURS, make_engine("sqlite://"))
    for path in PATHS:
        serve(application, path)
    gc.collect()
    gc.disable()
    for number in range(requests):
        serve(application, PATHS[number % len(PATHS)])
    return gc.collect()


if __name__ == "__main__":
    print(count_cycles(int(sys.argv[1])))
