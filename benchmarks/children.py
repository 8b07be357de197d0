"""Measurements that need a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from benchmarks import editions

if TYPE_CHECKING:
    from pathlib import Path


def run(module: str, *arguments: object, directory: Path = editions.ROOT) -> Any:
    """Run a module that prints JSON, and return what it printed.

    :param directory: where the package is, see :func:`editions.directories`.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        check=False,
        cwd=directory,
        env=editions.environment(),
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{module} {arguments} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout)
