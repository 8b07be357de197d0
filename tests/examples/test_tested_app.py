"""The example application's own tests: they leave no row, and notice a broken isolation."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from tests.examples.test_examples import EXAMPLES, environment

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy import URL

    from tests.support.postgres import Server

SUITE = EXAMPLES / "tested_app"


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database that outlives the runs of the suite."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'guestbook.db'}"
    server: Server = request.getfixturevalue("postgres_server")
    own: URL = request.getfixturevalue("postgres_url")
    made = server.create_database(f"tested_app_{own.database}")
    return made.render_as_string(hide_password=False)


def run(url: str, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-W",
            "error",
            "-p",
            "no:cacheprovider",
            *arguments,
            SUITE,
        ],
        cwd=directory,
        env=environment(DATABASE_URL=url, PYTHONPATH=str(directory)),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def rows(url: str) -> int:
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        return sum(
            connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one()
            for table in ("guest", "entry")
        )


def test_it_runs_twice_in_a_row_and_leaves_no_row(url: str, tmp_path: Path) -> None:
    """Nothing of the first run is there for the second one."""
    for _ in range(2):
        result = run(url, tmp_path)
        assert result.returncode == 0, result.stdout
        assert " passed" in result.stdout
        assert rows(url) == 0


MUTATIONS = {
    "no outer rollback": """
        end = SharedConnection.end

        def commit_and_end(self):
            self._connection.commit()
            end(self)

        SharedConnection.end = commit_and_end
    """,
    "no savepoints": """
        Savepoints._emit = lambda self, order, name: None
    """,
    "no re-binding": """
        Isolation.bind = lambda self, factory: None
    """,
    "no undoing in the inner isolation": """
        SharedConnection.close_level = lambda self, level: None
    """,
}


@pytest.mark.long
@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_it_fails_if_the_isolation_is_broken(tmp_path: Path, mutation: str) -> None:
    """Each part of the isolation is needed, and its loss is noticed."""
    lines = [line[8:] for line in mutation.splitlines()]
    (tmp_path / "mutation.py").write_text(
        "from wsgi_dbsession.testing._isolation import Isolation, SharedConnection\n"
        "from wsgi_dbsession.testing._savepoints import Savepoints\n" + "\n".join(lines),
        encoding="utf-8",
    )
    result = run(f"sqlite:///{tmp_path / 'guestbook.db'}", tmp_path, "-p", "mutation")
    assert result.returncode == pytest.ExitCode.TESTS_FAILED, result.stdout
