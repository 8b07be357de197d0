"""The editions of the package that are measured: this one, and the first one from git."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import report

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
FIRST, THIS = "first edition", "this one"
FIRST_COMMIT = "5d11756"


@contextlib.contextmanager
def directories() -> Iterator[dict[str, Path]]:
    """Yield in which directory a process must be started to import which edition."""
    with tempfile.TemporaryDirectory() as directory:
        found = {THIS: ROOT}
        archive = subprocess.run(
            ["git", "archive", FIRST_COMMIT, "wsgi_dbsession"],
            capture_output=True,
            check=False,
            cwd=ROOT,
        )
        if archive.returncode:
            report.warn(f"no first edition to compare with: {archive.stderr.decode().strip()}")
        else:
            with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
                files.extractall(directory, filter="data")
            found = {FIRST: Path(directory), **found}
        yield found


def environment() -> dict[str, str]:
    """Return the environment in which ``python -m`` finds the benchmarks in any directory."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}
