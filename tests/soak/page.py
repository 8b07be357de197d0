"""The report of a run, as Markdown with two pictures."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

from benchmarks import chart, report

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    Results = dict[str, Any]

DISTRIBUTIONS = (
    "wsgi_dbsession",
    "SQLAlchemy",
    "psycopg",
    "psycopg2-binary",
    "pg8000",
    "PyMySQL",
    "gunicorn",
    "gevent",
    "waitress",
)
TOLD = {
    "success": "succeeded",
    "refusal": "refused",
    "cut": "cut",
    "silence": "no answer",
}
MOST_VIOLATIONS = 20


def circumstances() -> dict[str, str]:
    """Return when, where and with what a run was made."""
    return {
        "date": report.now(),
        "commit": report.commit(),
        "machine": report.machine(),
        "versions": report.versions(DISTRIBUTIONS),
    }


def transfers(results: Results) -> int:
    """Return how many transfers were sent, without those of the controls."""
    return sum(each["transfers"] for each in results["segments"])


def violations(results: Results) -> list[dict[str, Any]]:
    """Return the violations of all segments."""
    return [each for segment in results["segments"] for each in segment["violations"]]


def failures(results: Results) -> list[str]:
    """Return what makes the run fail, a line each."""
    blind = [f"NOT CAUGHT: {each['name']}" for each in results["controls"] if not each["caught"]]
    return blind + [
        f"{each['kind']}: {each['token']}: {'; '.join(each['history'])}"
        for each in violations(results)
    ]


def render(results: Results, directory: Path) -> str:
    """Return the page, and draw its pictures in a directory."""
    return "\n".join(
        [
            *_render_head(results),
            *_render_servers(results, directory),
            *_render_faults(results, directory),
            *_render_controls(results),
            *_render_shapes(results),
            *_render_violations(results),
        ]
    )


def _render_head(results: Results) -> Iterable[str]:
    found, controls = violations(results), results["controls"]
    caught = sum(each["caught"] for each in controls)
    sent = transfers(results)
    yield "# The bank: results of the soak test\n"
    yield report.prose("""
        Written by `make soak`: do not edit. Clients sent transfers between accounts through real
        servers, while faults were made. Then the books were compared with what each client was
        told.
    """)
    yield report.table(
        ["what", "count"],
        [
            ["transfers", f"**{sent:,}**"],
            ["violations", f"**{len(found)}**"],
            ["controls that were caught", f"**{caught} of {len(controls)}**"],
            ["faults", f"{sum(_faults(results, 'faults').values()):,}"],
            ["outcomes that were logged as unknown", f"{_sum(results, 'unknown'):,}"],
            ["prepared transactions that were resolved", f"{_sum(results, 'resolved'):,}"],
            ["sums that readers checked", f"{_sum(results, 'reads'):,}"],
        ],
    )
    yield (
        f"- {results['date']}, commit {results['commit']}, seed {results['seed']},"
        f" {results['seconds'] / 60:.0f} minutes, {results['database']}\n"
        f"- {results['machine']}\n"
        f"- {results['versions']}\n"
    )


def _render_servers(results: Results, directory: Path) -> Iterable[str]:
    servers: dict[str, Counter[str]] = defaultdict(Counter)
    memory: dict[str, int] = defaultdict(int)
    growth: dict[str, list[float]] = defaultdict(list)
    for segment in results["segments"]:
        name = segment["server"]
        for counts in segment["told"].values():
            servers[name].update(counts)
        servers[name]["unknown"] += segment["unknown"]
        memory[name] = max(memory[name], segment["memory"])
        growth[name].append(segment["growth"])
    chart.bars(
        directory / "soak-servers.svg",
        "What the clients were told",
        "transfers",
        {
            server: {what: counts[told] for told, what in TOLD.items()}
            for server, counts in servers.items()
        },
    )
    yield "## Servers\n"
    yield "![What the clients were told, by server](soak-servers.svg)\n"
    yield report.prose("""
        "Refused" is a whole response with status 4xx or 5xx: by a view that is wrong on purpose,
        by a lost race, or by a fault. The last two columns are of the workers: the memory of the
        largest, and how many objects a request left, measured over 200 requests without faults;
        up to three times, because the first of them may open connections that faults have closed.
    """)
    yield report.table(
        ["server", *TOLD.values(), "logged as unknown", "MB", "objects"],
        [
            [
                server,
                *(f"{counts[told]:,}" for told in TOLD),
                str(counts["unknown"]),
                str(memory[server]),
                f"{max(growth[server]):.2f}",
            ]
            for server, counts in servers.items()
        ],
    )
    configurations = Counter[str]()
    for segment in results["segments"]:
        configurations[segment["configuration"]] += segment["transfers"]
    yield report.table(
        ["driver and isolation level", "transfers"],
        [[name, f"{count:,}"] for name, count in sorted(configurations.items())],
    )


def _render_faults(results: Results, directory: Path) -> Iterable[str]:
    made, felt = _faults(results, "faults"), _faults(results, "felt")
    chart.bars(
        directory / "soak-faults.svg",
        "Faults, and the transfers that failed while they lasted",
        "how often",
        {
            "made": dict(made.most_common()),
            "transfers that failed": {
                name: felt[name] for name, _ in made.most_common() if name in felt
            },
        },
    )
    yield "## Faults\n"
    yield "![Faults, and the transfers that failed](soak-faults.svg)\n"
    yield report.table(
        ["fault", "made", "transfers that failed while it lasted"],
        [
            [name, f"{count:,}", f"{felt[name]:,}" if name in felt else ""]
            for name, count in made.most_common()
        ],
    )


def _render_controls(results: Results) -> Iterable[str]:
    yield "## Controls\n"
    yield report.prose("""
        Each of these is wrong on purpose, and was run before the rest. If one of them is not
        caught, the comparison is blind, and the run fails.
    """)
    yield "| control | what is wrong | caught | what was found |\n| --- | --- | --- | --- |"
    for each in results["controls"]:
        kinds = ", ".join(f"{kind} ({count})" for kind, count in sorted(each["kinds"].items()))
        caught = "yes" if each["caught"] else "**no**"
        yield f"| {each['name']} | {each['wrong']} | {caught} | {kinds} |"
    yield ""


def _render_shapes(results: Results) -> Iterable[str]:
    shapes: dict[str, Counter[str]] = defaultdict(Counter)
    for segment in results["segments"]:
        for shape, counts in segment["told"].items():
            shapes[shape].update(counts)
    yield "## Shapes of requests\n"
    yield report.prose("""
        The middleware, the body, and what the view does. Views that swallow an error, close the
        Session, fail at the flush or at COMMIT, veto or raise must never succeed on PostgreSQL.
    """)
    yield report.table(
        ["shape", *TOLD.values()],
        [
            [shape, *(f"{counts[told]:,}" for told in TOLD)]
            for shape, counts in sorted(shapes.items())
        ],
    )


def _render_violations(results: Results) -> Iterable[str]:
    found = violations(results)
    yield "## Violations\n"
    if not found:
        yield "None.\n"
    for each in found[:MOST_VIOLATIONS]:
        yield f"- **{each['kind']}**: `{each['token']}`"
        for line in each["history"]:
            yield f"  - `{line}`"
    if len(found) > MOST_VIOLATIONS:
        yield f"- and {len(found) - MOST_VIOLATIONS} more"


def _sum(results: Results, name: str) -> int:
    counts: list[int] = [segment[name] for segment in results["segments"]]
    return sum(counts)


def _faults(results: Results, name: str) -> Counter[str]:
    found = Counter[str]()
    for segment in results["segments"]:
        found.update(segment[name])
    return found
