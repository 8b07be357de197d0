"""Ends the servers that run in a directory, and removes it, even if the tests were killed.

Run as ``python -I -S sweeper.py DIRECTORY``, with the reading end of a pipe as standard input: the
operating system closes the pipe when the process with its other end ends, however it ends. Only
processes whose working directory is in DIRECTORY are touched, of whatever parent (Linux).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path


def running(directory: Path) -> list[int]:
    """Return the processes whose working directory is in ``directory``."""
    found: list[int] = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended, or is another user's
            if Path(os.readlink(entry / "cwd")).is_relative_to(directory):
                found.append(int(entry.name))
    return found


def children(pid: int) -> list[int]:
    """Return the children of a process."""
    found: list[int] = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # The name, in parentheses, may contain spaces; the parent is the second word after it.
            words = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(words[1]) == pid:
                found.append(int(entry.name))
    return found


def sweep(directory: Path) -> None:
    """Kill what runs in ``directory``, and remove it."""
    deadline = time.monotonic() + 30
    while (pids := running(directory)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.stdin.buffer.read()
    sweep(Path(sys.argv[1]))
