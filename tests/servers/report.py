"""Write docs/servers.md from what the suite saw.

python -m tests.servers.report        run the suite, write down what it sees, write the page
python -m tests.servers.report page   write the page anew from what is written down
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from .facts import RESULTS, Results, load
from .fleet import SERVERS

TEMPLATE = Path(__file__).with_name("page.md")
PAGE = Path(__file__).parents[2] / "docs" / "servers.md"

#: heading of a column: the facts in it
Columns = dict[str, list[str]]

BODIES = [
    "list of one",
    "list",
    "sized",
    "one, length",
    "generator, length",
    "one",
    "generator",
    "empty",
    "write",
    "write, length",
]

FAILED: Columns = {
    "list": ["failed commit: list of one", "failed commit: list"],
    "one block, `Content-Length`": ["failed commit: one, length"],
    "stream, `Content-Length`": ["failed commit: generator, length"],
    "stream without": ["failed commit: sized", "failed commit: one", "failed commit: generator"],
    "`write()`, `Content-Length`": ["failed commit: write, length"],
    "`write()` without": ["failed commit: write"],
    "empty": ["failed commit: empty"],
    "`HEAD`": [f"failed commit, HEAD: {kind}" for kind in BODIES],
    "stream without, HTTP/1.0": ["failed commit, HTTP/1.0: generator"],
}
CHOICES: Columns = {
    "`commit_error`, list or one block": [
        f"commit_error: {kind}" for kind in ("list of one", "list", "one, length", "empty")
    ],
    "`commit_error`, stream, `Content-Length`": ["commit_error: generator, length"],
    "`commit_error`, stream without": [
        f"commit_error: {kind}" for kind in ("sized", "one", "generator")
    ],
    '`commit_on="headers"`, stream without, HTTP/1.0': [
        f'failed commit, commit_on="headers", HTTP/1.0: {kind}'
        for kind in ("one", "generator", "write")
    ],
    '`commit_on="close"`, for comparison': ['failed commit, commit_on="close": one, length'],
}
ERRORS: Columns = {
    "in the call": [
        "error, call: generator",
        "error, call: generator, length",
        "error, call: generator application",
    ],
    "before the first block": [
        "error, first: generator",
        "error, first: generator, length",
        "error, first: generator application",
    ],
    "between blocks, `Content-Length`": ["error, between: generator, length"],
    "between blocks without": [
        "error, between: generator",
        "error, between: generator application",
    ],
    "after the last block without": [
        "error, end: generator",
        "error, end: generator application",
    ],
}
CLIENTS: Columns = {
    "at once": ["interleaved"],
    "keep-alive": ["keep-alive"],
    "client goes away in mid-stream": ["disconnect: closes", "disconnect: resets"],
    "database free after (s)": ["disconnect seconds: closes", "disconnect seconds: resets"],
    "50 slow readers, pool of 2": ["slow readers"],
    "2 streams hold a pool of 2": ["pool exhausted"],
}
PROCESSES: Columns = {
    "fork": ["fork"],
    "SIGKILL in mid-request": ["killed"],
    "serves again after (s)": ["killed seconds"],
    "Python's `os.sendfile`": ["os.sendfile"],
}
#: facts that are numbers, and those that not every server has
OPTIONAL = {
    "disconnect seconds: closes",
    "disconnect seconds: resets",
    "killed seconds",
    "slow readers seconds",
}


def cell(facts: dict[str, str], names: list[str]) -> str:
    """Put the facts of a cell in words, each once."""
    words = list(dict.fromkeys(facts[name] for name in names if name in facts))
    return " / ".join(f"**{word}**" if is_broken(word) else word for word in words) or "-"


def is_broken(word: str) -> bool:
    """Say whether a fact of a failed request is a success to its client."""
    return word in ("200", "200, whole", "200, ended by closing")


def table(results: Results, columns: Columns) -> list[str]:
    """Write a table with a row for each server that was run."""
    lines = ["| server | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {server.name} | "
        + " | ".join(cell(results[server.name], names) for names in columns.values())
        + " |"
        for server in SERVERS
        if "not run" not in results[server.name]
    ]
    return [*lines, ""]


def limits(results: Results) -> list[str]:
    """List where a server makes the guarantee impossible."""
    lines = []
    for server in SERVERS:
        facts = results[server.name]
        where = [
            heading
            for heading, names in FAILED.items()
            if any(is_broken(facts.get(name, "")) for name in names)
            and not heading.endswith("HTTP/1.0")
        ]
        if where:
            lines.append(f"- {server.name}: {', '.join(where)}.")
    return [*lines, ""]


def set_ups(results: Results) -> list[str]:
    """Name what was run, and what was not."""
    lines = []
    for server in SERVERS:
        facts = results[server.name]
        if "not run" in facts:
            lines += [f"- **{server.name}**: not run, {facts['not run']}.", ""]
            continue
        lines += [f"- **{server.name}**: {facts['versions']}.", "", "  ```console"]
        lines += [f"  $ {server.command}", "  ```", ""]
    return lines


def page(results: Results) -> str:
    """Write the page: its words from page.md, with what was seen."""
    parts = {
        "FAILED": table(results, FAILED),
        "LIMITS": limits(results),
        "CHOICES": table(results, CHOICES),
        "ERRORS": table(results, ERRORS),
        "CLIENTS": table(results, CLIENTS),
        "PROCESSES": table(results, PROCESSES),
        "SET-UPS": set_ups(results),
    }
    text = TEMPLATE.read_text()
    for name, lines in parts.items():
        text = text.replace(f"@{name}@\n", "\n".join(lines).rstrip() + "\n")
    return text


def required() -> set[str]:
    """Return the facts that every server must have."""
    every = (FAILED, CHOICES, ERRORS, CLIENTS, PROCESSES)
    return {name for columns in every for names in columns.values() for name in names} - OPTIONAL


def record() -> int:
    """Run the suite, and write down what it sees."""
    with tempfile.TemporaryDirectory() as folder:
        code = subprocess.call(
            [
                *(sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadgroup", "-q"),
                str(Path(__file__).parent),
            ],
            env=os.environ | {"WSGI_DBSESSION_RECORD": folder},
        )
        if code:
            return code
        results: Results = {server.name: {} for server in SERVERS}
        for file in Path(folder).iterdir():
            for line in file.read_text().splitlines():
                name, what, value = json.loads(line)
                results[name][what] = value
        for name, facts in load().items():
            # What cannot run here keeps what was seen elsewhere, of the versions that it names.
            if "not run" in results.get(name, ()):
                results[name] = facts
    ordered = {name: dict(sorted(facts.items())) for name, facts in results.items()}
    RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")
    return 0


def main(words: list[str]) -> int:
    """Do what the command line says."""
    if words != ["page"] and (code := record()):
        return code
    PAGE.write_text(page(load()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
