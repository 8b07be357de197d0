"""The databases that the tests use are what the tests take them for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import psycopg
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import Session

from tests.support import postgres
from tests.support.models import Author, Book, Database, Note

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy import URL


def test_a_commit_really_fails(database: Database) -> None:
    """A deferred foreign key passes the flush and fails the commit."""
    with Session(database.engine) as session:
        session.add_all([Note(text="lost"), Book(author_id=7)])
        session.flush()
        with pytest.raises(IntegrityError):
            session.commit()

    assert database.notes() == []


def test_a_deferred_key_may_be_mended_before_the_commit(database: Database) -> None:
    """The author may come after the book."""
    with Session(database.engine) as session, session.begin():
        session.add(Book(author_id=7))
        session.flush()
        session.add(Author(id=7))

    assert database.committed(Book.author_id) == [7]


def test_the_observer_sees_only_what_is_committed(database: Database) -> None:
    """Neither flushed rows nor rolled back ones count; savepoints work."""
    with Session(database.engine) as session:
        session.add(Note(text="kept"))
        with session.begin_nested() as savepoint:
            session.add(Note(text="given up"))
            session.flush()
            savepoint.rollback()
        assert database.notes() == []
        session.commit()

    assert database.notes() == ["kept"]


def test_two_phase_transactions_are_enabled(
    postgres_database: Database, postgres_admin: postgres.Admin
) -> None:
    """PostgreSQL prepares a transaction, and the admin sees it."""
    with Session(postgres_database.engine, twophase=True) as session:
        session.add(Note(text="twice"))
        session.prepare()
        assert len(postgres_admin.prepared()) == 1
        session.commit()

    assert postgres_admin.prepared() == []
    assert postgres_database.notes() == ["twice"]


def test_the_admin_ends_connections(
    postgres_database: Database, postgres_admin: postgres.Admin
) -> None:
    """A terminated backend is gone when the call returns, and its client finds out."""
    with postgres_database.engine.connect() as connection:
        connection.execute(text("SELECT 1"))
        assert [each.query for each in postgres_admin.activity("idle in transaction")]

        assert postgres_admin.terminate() == 1

        postgres_admin.wait_for(0)
        with pytest.raises(OperationalError):
            connection.execute(text("SELECT 1"))


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "pg8000"])
def test_each_driver_connects(postgres_url: URL, driver: str) -> None:
    """The URL needs only another driver name."""
    engine = create_engine(postgres_url.set(drivername=f"postgresql+{driver}"))
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT current_database()")) == postgres_url.database
    engine.dispose()


def test_the_server_listens_on_a_unix_socket(postgres_server: postgres.Server) -> None:
    """It is there too, for what differs between sockets."""
    engine = create_engine(postgres_server.url("postgres", unix_socket=True))
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT inet_server_addr() IS NULL"))
    engine.dispose()


@pytest.mark.parametrize(
    "signal_number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.long)]
)
def test_no_server_outlives_its_run(signal_number: int) -> None:
    """Ctrl-C or the sudden death of the run ends the server and removes its files."""
    script = (
        "import signal, time\n"
        "from tests.support import postgres\n"
        # A run in the background of a shell may have inherited that it ignores Ctrl-C.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "run = postgres.Run()\n"
        "try:\n"
        "    print(run.directory, postgres.server(run.directory).port, flush=True)\n"
        "    time.sleep(60)\n"
        "finally:\n"
        "    run.end()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        directory, port = process.stdout.readline().split()
        server = postgres.Server(directory, int(port))
        server.connect().close()
        process.send_signal(signal_number)
        process.wait(20)

    deadline = time.monotonic() + 20
    while os.path.exists(directory) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not os.path.exists(directory)
    with pytest.raises(psycopg.OperationalError):
        server.connect()


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    """The message reaches whoever asked for the server."""
    (tmp_path / "run.lock").touch()
    result = subprocess.run(
        [sys.executable, "-I", "-S", postgres.KEEPER, tmp_path, tmp_path / "nowhere"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 1
    assert "PostgreSQL did not start: " in result.stderr
