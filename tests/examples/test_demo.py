"""The program of ``make demo`` presses each button, serves the page and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from tests.examples.test_examples import EXAMPLES, ask, environment

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.postgres import Server

BUTTONS = 6


def demo(*options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / "demo.py"), *options],
        env=environment(**variables),
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
    )


@contextmanager
def starting(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Run the demo in a session of its own, with its temporary files in a folder."""
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / "demo.py")],
        env=environment(TMPDIR=str(folder)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=10)


def wait_for_address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Now try it yourself"):
            return line.split()[-1]
    raise AssertionError(process.communicate()[1])


def test_each_button_does_what_it_promises() -> None:
    """The demo exits with 0 after it has pressed each button, on the SQLite file it makes."""
    done = demo("--once")

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n  As promised.") == BUTTONS


def test_each_button_does_what_it_promises_on_postgresql(postgres_server: Server) -> None:
    """The same with PostgreSQL, whose driver lets greenlets switch."""
    url = postgres_server.create_database("demo").render_as_string(hide_password=False)

    done = demo("--once", DATABASE_URL=url)

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n  As promised.") == BUTTONS


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("postgresql+nosuchdriver://", id="a driver that is not installed"),
        pytest.param("postgresql+psycopg://127.0.0.1:1/x", id="a database that does not answer"),
    ],
)
def test_a_database_that_cannot_be_used_is_named(url: str) -> None:
    """The error names DATABASE_URL, without a traceback."""
    done = demo("--once", DATABASE_URL=url)

    assert done.returncode == 1
    assert done.stderr.startswith("Cannot use the database of DATABASE_URL")
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_named() -> None:
    """The error names the port, without a traceback."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = demo("--once", PORT=str(taken.getsockname()[1]))

    assert done.returncode == 1
    assert done.stderr.startswith("Cannot listen on port")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.long),
        pytest.param(signal.SIGHUP, marks=pytest.mark.long),
    ],
)
def test_a_signal_leaves_nothing_behind(number: signal.Signals, tmp_path: Path) -> None:
    """No process, no file and no port is left, even if a stream holds a transaction."""
    with starting(tmp_path) as process:
        address = wait_for_address(process)
        status, page = ask(address)
        made = list(tmp_path.iterdir())
        port = urlsplit(address).port
        stream = HTTPConnection("127.0.0.1", port, timeout=10)
        stream.request("POST", "/stream")
        stream.getresponse().readline()
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
        stream.close()

    assert status == 200
    assert "<td>Ada</td><td>Hello!</td>" in page
    assert made, "the demo does not use the folder that this test looks at"
    assert process.returncode == 0, errors
    assert errors == ""
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_signal_stops_the_buttons_too(tmp_path: Path) -> None:
    """The demo does not press all buttons before it stops."""
    with starting(tmp_path) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=30)

    assert process.returncode == 0, errors
    assert errors == ""
    assert "Now try it yourself" not in output
    assert list(tmp_path.iterdir()) == []
