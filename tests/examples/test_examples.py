"""Tests of the examples, each run as its user would run it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
from sqlalchemy import create_engine, text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.postgres import Server

EXAMPLES = Path(__file__).parents[2] / "examples"


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
    return {**kept, "PYTHONUNBUFFERED": "1", **variables}


@contextmanager
def running(example: str, directory: Path, **variables: str) -> Iterator[str]:
    """Run an example in a directory of its own; yield its address once it listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / example)],
        cwd=directory,
        env=environment(PORT=str(port), **variables),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        for _ in range(200):
            assert process.poll() is None, process.communicate()[1].decode()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.communicate(timeout=10)


def ask(url: str, form: dict[str, str] | None = None) -> tuple[int, str]:
    data = None if form is None else urlencode(form).encode()
    try:
        with urlopen(url, data, timeout=10) as response:
            return response.status, response.read().decode()
    except HTTPError as error:
        with error:
            return error.code, error.read().decode()


def rows(database: Path, query: str) -> list[object]:
    engine = create_engine(f"sqlite:///{database}")
    with engine.connect() as connection:
        found = list(connection.scalars(text(query)))
    engine.dispose()
    return found


@pytest.mark.parametrize("example", ["flask_app.py", "bottle_app.py", "bare_wsgi.py"])
def test_the_application_saves_what_it_says_it_saved(example: str, tmp_path: Path) -> None:
    """A 201 is in the database, a 422 is not, and the page shows the rest."""
    with running(example, tmp_path) as address:
        saved = ask(address + "/", {"text": "hello"})
        in_the_database = rows(tmp_path / "notes.db", "SELECT text FROM note")
        refused = ask(address + "/", {"text": ""})
        _, page = ask(address + "/")

    assert saved == (201, "saved")
    assert in_the_database == ["hello"]
    assert refused == (422, "a note needs a text")
    assert "hello" in page
    assert rows(tmp_path / "notes.db", "SELECT text FROM note") == ["hello"]


def test_the_gevent_application_counts_and_streams(tmp_path: Path) -> None:
    """Visits are counted, and the stream tells of them."""
    with running("gevent_app.py", tmp_path) as address:
        counted = ask(address + "/a")
        in_the_database = rows(tmp_path / "hits.db", "SELECT path FROM hit")
        _, events = ask(address + "/events")

    assert counted == (200, "counted")
    assert in_the_database == ["/a"]
    assert events == "data: 1 hits\n\n" * 3


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_transfers_that_lost_a_race_run_again(
    database: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Eight clients at once see no error, and the sum stays."""
    variables: dict[str, str] = {}
    if database == "postgres":
        server: Server = request.getfixturevalue("postgres_server")
        url = server.create_database(f"transfers_{os.getpid()}")
        variables["DATABASE_URL"] = url.render_as_string(hide_password=False)
    replies: list[tuple[int, str]] = []

    with running("retry_app.py", tmp_path, **variables) as address:

        def client(source: str, target: str) -> None:
            for amount in (1, 2, 3):
                form = {"from": source, "to": target, "amount": str(amount)}
                replies.append(ask(address + "/", form))

        pairs = [("ann", "bob"), ("bob", "ann")] * 4
        threads = [threading.Thread(target=client, args=pair) for pair in pairs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        _, balances = ask(address + "/")

    assert [status for status, _ in replies] == [200] * 24
    assert json.loads(balances) == {"ann": 100, "bob": 100}


def test_the_job_works_on_the_notes(tmp_path: Path) -> None:
    """Each block of the job is a transaction, also in a thread, and also when it fails."""
    database = tmp_path / "notes.db"
    engine = create_engine(f"sqlite:///{database}")
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE note (text TEXT)"))
        connection.execute(text("INSERT INTO note VALUES ('a'), (''), ('b')"))
    engine.dispose()

    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "job.py")],
        cwd=tmp_path,
        env=environment(),
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.stdout.splitlines() == [
        "1 empty notes removed",
        "the notes are loud now",
        "nothing was deleted",
    ]
    assert rows(database, "SELECT text FROM note ORDER BY text") == ["A", "B"]
