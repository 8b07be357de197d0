"""Greenlets that are killed or time out at any moment leave nothing wrong behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from sqlalchemy import URL

    from tests.support.models import Database
    from tests.support.postgres import Admin

pytestmark = pytest.mark.promise("interruptions")

DRIVERS = [
    pytest.param("psycopg", id="psycopg"),
    pytest.param("pg8000", id="pg8000"),
]


def start(
    url: URL, driver: str, *arguments: str, stderr: int | None = None
) -> subprocess.Popen[str]:
    target = url.set(drivername=f"postgresql+{driver}")
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "gevent.monkey", "--module", "tests.core.gevent_load"),
            *(target.render_as_string(hide_password=False), *arguments),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,  # a full pipe would stop it
        text=True,
    )


@pytest.mark.long
@pytest.mark.parametrize("driver", DRIVERS)
def test_killed_and_timed_out_greenlets_leave_nothing_wrong(
    postgres_database: Database, postgres_admin: Admin, driver: str
) -> None:
    """No row, no answer, no connection and no Session is where it does not belong."""
    with start(postgres_database.url, driver, "7") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, "it failed, see its standard error"
        result: dict[str, Any] = json.loads(line)
        # What is still busy is a statement whose connection was thrown away.
        postgres_admin.wait_for(0, "active")
        postgres_admin.wait_for(0, "idle in transaction")
        postgres_admin.wait_for(0, "idle in transaction (aborted)")
    assert process.returncode == 0

    ended = result["ended"]
    # The last are those that went on after a timeout, as if nothing had been: no success for them.
    assert set(ended) <= {"well", "killed", "timed out", "PendingRollbackError"}
    assert min(ended["well"], ended["killed"], ended["timed out"]) >= 10, ended
    rows = Counter(postgres_database.notes())
    assert set(rows.values()) == {2}, "half of a transaction was committed"
    assert set(result["told"]) <= set(rows)
    assert not set(result["unfinished"]) & set(rows)
    assert result["wrong"] == []
    assert result["checked out"] == 0
    assert result["sessions"] == 0
    assert result["scope"] == []


@pytest.mark.parametrize("driver", DRIVERS)
def test_the_next_request_does_not_get_the_answer_to_an_interrupted_statement(
    postgres_url: URL, driver: str
) -> None:
    """Also where SQLAlchemy has not seen the interruption: the statement went past it."""
    with start(postgres_url, driver, "1", "--once") as process:
        output, _ = process.communicate()

    assert json.loads(output) == "second"


def test_a_plain_rollback_would_not_be_enough(postgres_url: URL) -> None:
    """pg8000 takes the late answer for that to the rollback, and so on with each statement.

    psycopg is no witness: it refuses the rollback while a statement is under way.
    """
    arguments = ("--once", "--plain-rollback")
    with start(postgres_url, "pg8000", "1", *arguments, stderr=subprocess.PIPE) as process:
        output, errors = process.communicate()

    assert process.returncode == 1
    assert output == ""
    assert "ProgrammingError" in errors
