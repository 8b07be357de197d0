"""Count instructions with valgrind: they repeat, whatever else the machine is doing.

``python -m benchmarks.instructions`` is what valgrind runs. It imports everything once and forks
for each count, so that only one start of the interpreter is paid for.

Lookups that miss CPython's cache of attributes are left out. Two names share a place of it by
their addresses, so which ones miss is chance. They are up to a twentieth of a request.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import Engine, event
from sqlalchemy.orm import configure_mappers
from sqlalchemy.pool import Pool

from benchmarks import editions
from benchmarks.applications.common import BLOCKS, BY_HAND, NONE, OURS, WATCHED, make_engine
from benchmarks.applications.every import make_application
from benchmarks.timing import fetch, serve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

_MISS = "find_name_in_mro"  # the function of CPython that is called then

REQUESTS = 20
WARM_UP = 10  # caches fill, the interpreter specialises


_LISTENERS: tuple[tuple[str, str, type, str], ...] = (
    ("_fork", "_on_connect", Pool, "connect"),
    ("_fork", "_on_checkout", Pool, "checkout"),
    ("_driver", "_on_checkout", Pool, "checkout"),
    ("_spoiled", "_on_error", Engine, "handle_error"),
)


class Row(NamedTuple):
    """A kind of request, and what it is compared with."""

    name: str
    framework: str
    path: str
    base: str
    bar: float  # thousand instructions more than the base, at most
    design: float  # the bar that the design asked for
    peer: str = OURS


class Count(NamedTuple):
    """Instructions of a request, in thousands."""

    base: float
    ours: float

    @property
    def more(self) -> float:
        return self.ours - self.base


ROWS = (
    Row("no Session used, list", "bare WSGI", "/", NONE, 25, 15),
    Row("no Session used, iterable of one block", "bare WSGI", "/sized", NONE, 57, 36),
    Row("no Session used, Flask", "Flask", "/", NONE, 57, 34),
    Row("SELECT, list", "bare WSGI", "/select", BY_HAND, 57, 0),
    Row("INSERT, list", "bare WSGI", "/insert", BY_HAND, 57, 0),
    Row("SELECT, Flask", "Flask", "/select", BY_HAND, 95, 15),
    Row("INSERT, Flask", "Flask", "/insert", BY_HAND, 95, 15),
)
# Here the bar is a share of the base, in percent.
WATCHED_ROWS = (
    Row("SELECT, list, watched", "bare WSGI", "/select", OURS, 5, 5, WATCHED),
    Row("SELECT, Flask, watched", "Flask", "/select", OURS, 5, 5, WATCHED),
)
FURTHER_BLOCK = Row("a further block of a stream", "bare WSGI", "/stream", NONE, 7, 5)
_ONE_BLOCK = Row("", "bare WSGI", "/stream-of-one", NONE, 0, 0)
FRAMEWORKS = ("bare WSGI", "Flask")


class ValgrindError(Exception):
    """Valgrind does not run here."""


def measure(directories: Mapping[str, Path], *, quick: bool) -> dict[str, dict[str, Count]]:
    """Return the counts by edition and name of the row.

    :param directories: where the package is, by edition.
    :raises ValgrindError: valgrind does not run here.
    """
    frameworks = FRAMEWORKS[:1] if quick else FRAMEWORKS
    runs = [(edition, framework) for edition in directories for framework in frameworks]
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as executor:
        found = executor.map(lambda run: _run(directories[run[0]], run[1], quick=quick), runs)
        counts: dict[str, dict[str, Count]] = {}
        for (edition, _), rows in zip(runs, found, strict=True):
            counts.setdefault(edition, {}).update(rows)
    return counts


def thousands(module: str, *arguments: str, package: Path) -> dict[tuple[str, str], float]:
    """Return thousand instructions of a request, by two names.

    :param module: prints lines of four fields: the names, and the processes to subtract.
    :param package: the directory where the package is.
    :raises ValgrindError: valgrind does not run here.
    """
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise ValgrindError("valgrind is not installed")
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            [
                *(valgrind, "--tool=callgrind", f"--callgrind-out-file={directory}/%p.out"),
                *(sys.executable, "-m", module, *arguments),
            ],
            capture_output=True,
            check=False,
            cwd=package,
            env=editions.environment() | {"PYTHONHASHSEED": "0"},
            text=True,
        )
        if done.returncode:
            # An old valgrind does not know a new processor's instructions.
            raise ValgrindError(f"valgrind failed: {done.stderr.strip()[-500:]}")
        totals = {}
        for line in done.stdout.splitlines():
            first, second, less, more = line.split("\t")
            difference = _total(directory, more) - _total(directory, less)
            totals[first, second] = difference / REQUESTS / 1000
    return totals


def _run(package: Path, framework: str, *, quick: bool) -> dict[str, Count]:
    arguments = [framework, *(["--quick"] if quick else [])]
    totals = thousands("benchmarks.instructions", *arguments, package=package)
    rows = [
        row
        for row in (*ROWS, *WATCHED_ROWS)
        # The first edition has no watch.
        if row.framework == framework and {(row.path, row.base), (row.path, row.peer)} <= {*totals}
    ]
    found = {row.name: _count(totals, row) for row in rows}
    if (FURTHER_BLOCK.path, NONE) in totals:
        one, all_ = _count(totals, _ONE_BLOCK), _count(totals, FURTHER_BLOCK)
        found[FURTHER_BLOCK.name] = Count(
            *((more - less) / (BLOCKS - 1) for more, less in zip(all_, one, strict=True))
        )
    return found


def _count(totals: Mapping[tuple[str, str], float], row: Row) -> Count:
    return Count(totals[row.path, row.base], totals[row.path, row.peer])


def _total(directory: str, pid: str) -> int:
    with Path(directory, f"{pid}.out").open() as lines:
        return total(lines)


def total(lines: Iterable[str]) -> int:
    """Return the instructions of a profile, see "Callgrind Format Specification" of valgrind."""
    missing: set[str] = set()  # the numbers of the function: a recursive call has its own
    found = missed = 0
    is_miss = is_call = False
    for line in lines:
        if is_call:  # what the call before has cost, with all that it called
            missed += int(line.split()[1]) if is_miss else 0
            is_call = False
        elif line.startswith(("fn=", "cfn=")):
            number, _, name = line.partition("=")[2].partition(" ")
            if name.partition("'")[0].strip() == _MISS:
                missing.add(number.strip())
            is_miss = number.strip() in missing
        elif line.startswith("calls="):
            is_call = True
        elif line.startswith(("totals:", "summary:")):
            found = int(line.split()[1])
    if not found:
        raise RuntimeError("callgrind wrote no total")
    return found - missed


def count(rows: Iterable[Row]) -> None:
    """Print which two processes' counts have to be subtracted from each other."""
    configure_mappers()
    has_watch = importlib.util.find_spec("wsgi_dbsession.watch") is not None
    peers = ((row.framework, peer, row.path) for row in rows for peer in (row.base, row.peer))
    for framework, peer, path in dict.fromkeys(peers):
        if peer != WATCHED or has_watch:
            pids = [in_child(framework, peer, path, many) for many in (0, REQUESTS)]
            print(path, peer, *pids, sep="\t", flush=True)


def in_child(
    framework: str, peer: str, path: str, requests: int, prepare: Callable[[], None] | None = None
) -> int:
    """Make requests in a child, and return its process ID."""
    pid = os.fork()
    if not pid:
        try:
            gc.disable()  # a collection costs more than a request, and may come before
            if prepare is not None:
                prepare()
            if peer in (NONE, BY_HAND):
                _stop_listening()
            application = make_application(framework, peer, make_engine("sqlite://"))
            for _ in range(WARM_UP):
                fetch(application, path)
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


def _stop_listening() -> None:
    """Remove the package's listeners, as if it had not been imported."""
    for module, function, target, name in _LISTENERS:
        # The first edition has not all of them.
        listener = getattr(sys.modules.get(f"wsgi_dbsession.{module}"), function, None)
        if listener is not None and event.contains(target, name, listener):
            event.remove(target, name, listener)


def main(framework: str, *, quick: bool) -> None:
    every = (*ROWS, *WATCHED_ROWS, FURTHER_BLOCK, _ONE_BLOCK)
    rows = [row for row in every if row.framework == framework]
    count(rows[:1] if quick else rows)


if __name__ == "__main__":
    main(sys.argv[1], quick="--quick" in sys.argv)
