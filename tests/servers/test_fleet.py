"""The servers themselves: which of them run here, and that none outlives the tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .facts import record
from .fleet import HERE, SERVERS, Server


@pytest.mark.parametrize("server", SERVERS, ids=lambda server: server.name)
def test_the_server_can_run_here(server: Server) -> None:
    """Each server is run by the tests of this folder, or is reported here as missing."""
    if reason := server.missing():
        record(server.name, "not run", reason)
        pytest.skip(f"NOT RUN: {server.name}: {reason}")


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux adopts orphans")
@pytest.mark.parametrize("manner", ["by closing the pipe", "by dying", "by its time"])
def test_a_server_and_its_workers_end_with_the_tests(manner: str, tmp_path: Path) -> None:
    """The keeper ends a stubborn command and its orphans, also if the test process is killed."""
    pids = tmp_path / "pids"
    child = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
    command = (
        "import os, pathlib, subprocess, sys, time\n"
        f"worker = subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)\n"
        f"pathlib.Path({str(pids)!r}).write_text(f'{{os.getpid()}} {{worker.pid}} ')\n"
        "time.sleep(60)\n"
    )
    seconds = "1" if manner == "by its time" else "60"
    keeper = [sys.executable, str(HERE / "keeper.py"), seconds, sys.executable, "-c", command]
    # Between the keeper and us stands a process that can die as a test process can.
    between = (
        "import subprocess, sys\n"
        f"keeper = subprocess.Popen({keeper!r}, stdin=subprocess.PIPE)\n"
        "sys.stdin.read()\n"
        "keeper.stdin.close()\n"
        "keeper.wait()\n"
    )
    tests = subprocess.Popen([sys.executable, "-c", between], stdin=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while not (pids.exists() and pids.read_text().endswith(" ")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    processes = [int(pid) for pid in pids.read_text().split()]
    assert all(map(is_running, processes)) or manner == "by its time"
    assert tests.stdin is not None
    if manner == "by dying":
        os.kill(tests.pid, signal.SIGKILL)
    elif manner == "by closing the pipe":
        tests.stdin.close()
    while any(map(is_running, processes)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    tests.stdin.close()
    tests.wait(10)
