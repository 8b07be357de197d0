"""A child never uses the connections of its parent, however it was forked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text

if TYPE_CHECKING:
    from sqlalchemy import URL

    from tests.support.models import Database

# What runs in one process, for it takes its time to start.
SCENES = {
    "os.fork": (
        "share_nothing",
        "share_nothing_by_binds",
        "share_nothing_by_session",
        "share_nothing_by_commit",
        "in_a_request",
        "unwinding",
        "abandoned",
        "detached",
    ),
    "multiprocessing": ("share_nothing",),
    "C": ("share_nothing", "two_threads"),
}


@pytest.fixture(scope="module")
def seen(postgres_url: URL) -> dict[str, Any]:
    """What a process saw that forks, see :mod:`tests.core.forking`, by the way of the fork."""
    return {fork: run(postgres_url, fork, *scenes) for fork, scenes in SCENES.items()}


def run(url: URL, fork: str, *scenes: str) -> Any:
    result = subprocess.run(
        [
            *(sys.executable, "-W", "error", "-m", "tests.core.forking"),
            *(url.render_as_string(hide_password=False), fork, *scenes),
        ],
        capture_output=True,
        check=False,
        cwd=Path(__file__).parents[2],
        text=True,
        timeout=120,
    )
    assert (result.returncode, result.stderr) == (0, "")
    return json.loads(result.stdout)


pytestmark = [pytest.mark.xdist_group("fork"), pytest.mark.promise("forks")]


@pytest.mark.parametrize("fork", ["os.fork", "multiprocessing", "C"])
def test_a_child_has_connections_of_its_own(seen: dict[str, Any], fork: str) -> None:
    """Parent, child and grandchild each have one, and the parent's works afterwards.

    Also where no handler is called at the fork, as in the workers of uWSGI.
    """
    (before, block, request, grandchild, after), rows = seen[fork]["share_nothing"]

    assert before == after
    assert block == request
    assert len({before, block, grandchild}) == 3
    assert rows == 6


@pytest.mark.parametrize("scene", ["share_nothing_by_binds", "share_nothing_by_session"])
def test_an_engine_is_found_by_whatever_way_the_session_does(
    seen: dict[str, Any], scene: str
) -> None:
    """Bound to a class, or known to the Session only, and only as a copy with other options."""
    (before, block, request, grandchild, after), rows = seen["os.fork"][scene]

    assert before == after
    assert block == request
    assert len({before, block, grandchild}) == 3
    assert rows == 6


def test_an_engine_is_found_though_the_application_commits(seen: dict[str, Any]) -> None:
    """Where there is no transaction left at the end of the scope."""
    (before, child, after), rows = seen["os.fork"]["share_nothing_by_commit"]

    assert before == after != child
    assert rows == 4


def test_a_child_has_no_scope(seen: dict[str, Any]) -> None:
    """Forked in a request it opens one of its own; the request goes on and is committed."""
    (before, *children, after), rows = seen["os.fork"]["in_a_request"]

    assert before == after
    first, second = children[:3], children[3:]
    assert first[0] == second[0] == "no scope"
    assert first[1] == first[2]
    assert len({before, first[1], second[1]}) == 3
    assert rows == 7


def test_a_child_that_leaves_the_request_ends_nothing(seen: dict[str, Any]) -> None:
    """It neither commits nor rolls back its parent's work, nor closes its connection."""
    parents, rows = seen["os.fork"]["unwinding"]

    assert len(parents) == 4
    for before, after in parents:
        assert before == after
    assert rows == 9


def test_a_child_that_drops_a_response_ends_nothing(seen: dict[str, Any]) -> None:
    """The parent goes on with it."""
    (result, before, after), rows = seen["os.fork"]["abandoned"]

    assert result == "dropped"
    assert before == after
    assert rows == 3


def test_a_connection_without_a_pool_does_not_hinder_a_fork(seen: dict[str, Any]) -> None:
    """Detached, invalidated and closed ones are none of the child's business."""
    assert seen["os.fork"]["detached"][0] == ["int", "int", "int"]


def test_the_threads_of_a_child_do_not_meet(seen: dict[str, Any]) -> None:
    """One forgets the parent's connections, and the other waits for it."""
    (parent, *children), rows = seen["C"]["two_threads"]

    assert len(children) == 2
    assert parent not in children
    assert rows == 4


def test_a_connection_that_another_process_has_opened_is_replaced(
    sqlite_database: Database,
) -> None:
    """Outside of any scope, in a child of which no handler has heard."""
    with sqlite_database.engine.connect() as connection:
        parents = connection.connection.dbapi_connection
        connection.info["wsgi_dbsession.pid"] = -1

    with sqlite_database.engine.connect() as connection:
        assert connection.connection.dbapi_connection is not parents
        assert connection.scalar(text("SELECT 1")) == 1

    assert parents is not None
    parents.close()
