"""A pool of one connection serves fifty requests that wait at the same time."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Protocol

import pytest

from tests.core.released_load import REQUESTS, Load
from tests.support.models import Database, Note

if TYPE_CHECKING:
    from sqlalchemy import URL

pytestmark = pytest.mark.promise("released")

ALL = {f"{REQUESTS} waited at once": REQUESTS}
ONE = {"1 waited at once": 1, "pool timed out": REQUESTS - 1}


class Run(Protocol):
    def __call__(self, url: URL, *, hold: bool) -> dict[str, int]: ...


def in_threads(url: URL, *, hold: bool) -> dict[str, int]:
    return Load(url, hold=hold).run()


def in_greenlets(url: URL, *, hold: bool) -> dict[str, int]:
    command = [sys.executable, "-m", "gevent.monkey", "--module", "tests.core.released_load"]
    arguments = [url.render_as_string(hide_password=False), *(["--hold"] if hold else [])]
    done = subprocess.run(
        [*command, *arguments], check=True, capture_output=True, text=True, timeout=100
    )
    found: dict[str, int] = json.loads(done.stdout)
    return found


RUNS = pytest.mark.parametrize("run", [in_threads, in_greenlets], ids=["threads", "gevent"])


@pytest.fixture
def stocked(database: Database) -> Database:
    with database.observer.begin() as connection:
        connection.execute(Note.__table__.insert().values(text="there"))  # type: ignore[attr-defined]
    return database


@RUNS
def test_all_are_served_in_the_time_of_one_wait(stocked: Database, run: Run) -> None:
    """The service answers when all are there: none of them has held the connection."""
    assert run(stocked.url, hold=False) == ALL
    assert stocked.notes() == ["after 1"] * REQUESTS + ["there"]


@RUNS
def test_without_it_all_but_one_time_out(stocked: Database, run: Run) -> None:
    """The one that waits holds the connection: so the test above can fail."""
    assert run(stocked.url, hold=True) == ONE
    assert stocked.notes() == ["after 1", "there"]
