"""The pages of the documentation, and their code as a reader would use it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def blocks(page: str, language: str = "python") -> list[str]:
    """Return the code blocks of a page, named as below the repository's root."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def environment(python: str = sys.executable, **variables: str) -> dict[str, str]:
    """Return the variables of a process.

    :param python: the interpreter. This one finds the package of the checkout, another one has it
        installed.
    """
    ours = ("DATABASE_URL", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    if python == sys.executable:
        kept["PYTHONPATH"] = str(ROOT)
    return {**kept, "PYTHONUNBUFFERED": "1", **variables}


def run(
    folder: Path,
    *command: str,
    words: str = "",
    python: str = sys.executable,
    **variables: str,
) -> str:
    """Run ``python -m command`` in a folder, and return what it writes to its output."""
    done = subprocess.run(
        [python, "-m", *command],
        cwd=folder,
        env=environment(python, **variables),
        check=False,
        input=words,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    output: str = done.stdout
    return output


def unused_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port: int = unused.getsockname()[1]
    return port


@contextmanager
def serving(folder: Path, command: list[str], port: int) -> Iterator[str]:
    """Run a server in a folder; yield its address once it listens."""
    log = folder / f"server-{port}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment(command[0]),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 60
        while not _listens(port):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
