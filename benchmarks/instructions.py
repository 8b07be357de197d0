"""Count instructions with valgrind: they repeat, whatever else the machine is doing.

``python -m benchmarks.instructions`` is what valgrind runs. It imports everything once and forks
for each count, so that only one start of the interpreter is paid for.
"""

from __future__ import annotations

import gc
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sqlalchemy.orm import configure_mappers

from benchmarks import report
from benchmarks.applications.common import BY_HAND, NONE, OURS, make_engine
from benchmarks.applications.every import APPLICATIONS, make_application
from benchmarks.timing import fetch, serve

PATHS = {"no Session used": "/", "SELECT": "/select", "INSERT, COMMIT": "/insert"}
BARE_PATHS = {"no Session used, iterable of one block": "/sized"}
REQUESTS = 20
WARM_UP = 10  # caches fill, the interpreter specialises


class ValgrindError(Exception):
    """Valgrind does not run here."""


def measure(*, quick: bool) -> dict[str, Any]:
    """Return the instructions of a request by framework, work and peer, or why there are none."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        return _skip("valgrind is not installed")
    frameworks = list(APPLICATIONS)[:1] if quick else list(APPLICATIONS)
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as executor:
        try:
            counts = dict(
                zip(
                    frameworks,
                    executor.map(lambda name: _run(valgrind, name, quick), frameworks),
                    strict=True,
                )
            )
        except ValgrindError as error:
            return _skip(str(error))
    return {"counts": counts}


def _run(valgrind: str, framework: str, quick: bool) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            [
                *(valgrind, "--tool=callgrind", f"--callgrind-out-file={directory}/%p.out"),
                *(sys.executable, "-m", "benchmarks.instructions", framework),
                *(["--quick"] if quick else []),
            ],
            capture_output=True,
            check=False,
            env={**os.environ, "PYTHONHASHSEED": "0"},
            text=True,
        )
        if done.returncode:
            # An old valgrind does not know a new processor's instructions.
            raise ValgrindError(f"valgrind failed: {done.stderr.strip()[-500:]}")
        found: dict[str, dict[str, float]] = {}
        for line in done.stdout.splitlines():
            work, peer, less, more = line.split("\t")
            found.setdefault(work, {})[peer] = (
                _total(directory, more) - _total(directory, less)
            ) / REQUESTS
        return found


def _skip(reason: str) -> dict[str, Any]:
    report.warn(f"no instructions are counted: {reason}")
    return {"skipped": reason}


def _total(directory: str, pid: str) -> int:
    text = Path(directory, f"{pid}.out").read_text()
    found = re.search(r"^(?:totals|summary): (\d+)", text, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"callgrind wrote no total: {text[:500]}")
    return int(found[1])


def render(results: dict[str, Any]) -> str:
    head = "### Instructions\n"
    if "skipped" in results:
        return f"{head}\n**Not counted: {results['skipped']}.**\n"
    counts: dict[str, dict[str, dict[str, float]]] = results["counts"]
    parts = [
        head,
        report.prose("""
            The same, counted by `valgrind --tool=callgrind` with SQLite in memory, in thousands
            of instructions (the garbage collector is off meanwhile). Instructions are not time,
            but they do not depend on what else the machine does.
        """),
    ]
    rows = []
    for framework, works in counts.items():
        for work, peers in works.items():
            base = NONE if NONE in peers else BY_HAND
            rows.append([f"**{framework}, {work}**: {base}", f"{peers[base] / 1000:.1f}", "", ""])
            for peer, count in peers.items():
                if peer != base:
                    name = f"**{peer}**" if peer == OURS else peer
                    more = count - peers[base]
                    rows.append(
                        [
                            name,
                            f"{count / 1000:.1f}",
                            f"{more / 1000:+.1f}",
                            report.percent(count / peers[base]),
                        ]
                    )
    parts.append(report.table(["", "thousand", "more", "ratio"], rows))
    return "\n".join(parts)


def count(framework: str, *, quick: bool) -> None:
    """Print which two processes' counts have to be subtracted from each other."""
    configure_mappers()
    paths = PATHS | (BARE_PATHS if framework == "bare WSGI" else {})
    peers = list(APPLICATIONS[framework])
    if quick:
        paths, peers = {"no Session used": "/"}, [NONE, OURS]
    for work, path in paths.items():
        for peer in peers:
            # Each is the other where no Session is used.
            if peer != (BY_HAND if work.startswith("no Session") else NONE):
                pids = [_in_child(framework, peer, path, requests) for requests in (0, REQUESTS)]
                print(work, peer, *pids, sep="\t", flush=True)


def _in_child(framework: str, peer: str, path: str, requests: int) -> int:
    pid = os.fork()
    if not pid:
        try:
            application = make_application(framework, peer, make_engine("sqlite://"))
            for _ in range(WARM_UP):
                fetch(application, path)
            gc.collect()
            gc.disable()
            for _ in range(requests):
                serve(application, path)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError(f"a child ended with status {status}")
    return pid


if __name__ == "__main__":
    count(sys.argv[1], quick="--quick" in sys.argv)
