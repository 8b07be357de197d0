"""Database servers as child processes: their directory, user, ports, and their certain end."""

from __future__ import annotations

import contextlib
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from tests.support import sweeper

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Argument = str | Path

# Where Debian has servers, and where not every user's PATH leads.
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin", "/sbin"])
# Set where the packages must be there (in CI): nothing is skipped then.
REQUIRED = "TESTS_REQUIRE_CLUSTERS"


def require(program: str, package: str) -> str:
    """Return the path of a program; skip the test by name where it is not installed.

    With ``TESTS_REQUIRE_CLUSTERS`` in the environment the test fails instead.
    """
    return shutil.which(program, path=PATH) or missing(program, package)


def missing(what: str, package: str) -> NoReturn:
    """Skip the test for want of a package, or fail it where packages are required."""
    reason = f"{what} is not installed: apt-get install {package}"
    if os.environ.get(REQUIRED):
        pytest.fail(f"{reason} ({REQUIRED} is set)", pytrace=False)
    pytest.skip(reason)


def identity() -> dict[str, Any]:
    """Return the options of :class:`subprocess.Popen` for a user that servers accept."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def free_port() -> int:
    """Return a TCP port that is free, and that no outgoing connection will take.

    A server that is stopped has to find its port free again, so it is not one of those that Linux
    gives to clients (from 32768).
    """
    while True:
        port = random.randrange(15_000, 32_000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def wait_until(
    condition: Callable[[], object], what: str, *, timeout: float = 60, pause: float = 0.02
) -> None:
    """Wait until the condition is true; raise after ``timeout`` seconds, with its last error."""
    deadline = time.monotonic() + timeout
    while True:
        error: Exception | None = None
        try:
            if condition():
                return
        except Exception as caught:
            error = caught
        if time.monotonic() > deadline:
            raise AssertionError(f"timed out after {timeout} s: {what}") from error
        time.sleep(pause)


@contextlib.contextmanager
def directory(prefix: str) -> Iterator[Path]:
    """Make a directory for servers; end whatever runs in it when the block ends, and remove it.

    Also when the test process dies: :mod:`tests.support.sweeper` waits for that.
    """
    # Not below TMPDIR's value on systems where that is long: the path of a Unix socket is limited
    # to some hundred characters.
    root = "/tmp" if os.path.isdir("/tmp") else None
    made = Path(tempfile.mkdtemp(prefix=f"wsgi-dbsession-{prefix}-", dir=root)).resolve()
    who = identity()
    if who:
        os.chown(made, who["user"], who["group"])
    watch = subprocess.Popen(
        [sys.executable, "-I", "-S", sweeper.__file__, made],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield made
    finally:
        sweeper.sweep(made)
        assert watch.stdin is not None
        watch.stdin.close()
        watch.wait(60)


class Process:
    """A server's process, that can be started, killed, frozen, and started again.

    :param command: The program and its arguments.
    :param place: The directory to run in, which is that of :func:`directory` or below.
    :param name: What to call it in errors; the log is ``NAME.log`` there.
    """

    def __init__(self, command: Sequence[Argument], place: Path, name: str) -> None:
        self.command = command
        self.place = place
        self.name = name
        self.log = place / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process id; raise if it was never started."""
        assert self._process is not None, f"{self.name} was not started"
        return self._process.pid

    def start(self, *extra: Argument) -> None:
        """Start it; ``extra`` arguments are for this time only."""
        assert not self.is_running(), f"{self.name} is running"
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self.command, *extra],
                cwd=self.place,
                env={**os.environ, "LC_ALL": "C", "PATH": PATH, "HOME": str(self.place)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **identity(),
            )

    def is_running(self) -> bool:
        """Return whether the process exists."""
        return self._process is not None and self._process.poll() is None

    def wait_ready(self, condition: Callable[[], object], *, timeout: float = 60) -> None:
        """Wait until the condition is true; raise with the end of the log if the process ends."""

        def ready() -> bool:
            return not self.is_running() or bool(condition())

        try:
            wait_until(ready, f"{self.name} becomes ready", timeout=timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.tail()}") from error.__cause__
        assert self.is_running(), f"{self.name} ended\n{self.tail()}"

    def tail(self) -> str:
        """Return the end of the log."""
        return self.log.read_text(errors="replace")[-5_000:] if self.log.exists() else ""

    def send(self, number: int) -> None:
        """Send the process a signal."""
        os.kill(self.pid, number)

    def freeze(self) -> None:
        """Stop the process where it is (SIGSTOP): it answers nothing, and its connections stay."""
        self.send(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen process go on (SIGCONT)."""
        self.send(signal.SIGCONT)

    def kill(self) -> None:
        """Kill the process and its children at once (SIGKILL), as a crash of the machine would."""
        if not self.is_running():
            return
        self.freeze()  # so that it starts no other child in the meantime
        for pid in [*sweeper.children(self.pid), self.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait()

    def stop(self, number: int = signal.SIGTERM, *, timeout: float = 30) -> None:
        """Ask the process to end, and kill it if it does not."""
        if self.is_running():
            self.send(number)
            self.thaw()
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()

    def wait(self, timeout: float = 30) -> None:
        """Wait for the end of the process."""
        assert self._process is not None
        self._process.wait(timeout)


def run(command: Sequence[Argument], place: Path) -> None:
    """Run a program to its end, as the servers' user; raise with its output if it fails."""
    done = subprocess.run(
        command,
        cwd=place,
        env={**os.environ, "LC_ALL": "C", "PATH": PATH, "HOME": str(place)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **identity(),
    )
    if done.returncode:
        output = done.stdout.decode(errors="replace")[-5_000:]
        raise RuntimeError(f"{command[0]} failed with {done.returncode}:\n{output}")
