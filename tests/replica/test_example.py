"""The example runs as its user would run it, with SQLite and with replicas."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING
from urllib.request import HTTPCookieProcessor, build_opener

import pytest

from tests.examples.test_examples import running

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.clusters import PostgresCluster

pytestmark = pytest.mark.xdist_group("replica")


@pytest.mark.parametrize("database", ["sqlite", "replicas"])
def test_the_notes_are_read_where_nothing_can_be_written(
    database: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A client finds its note at once, and a GET that writes does write."""
    variables: dict[str, str] = {}
    if database == "replicas":
        cluster: PostgresCluster = request.getfixturevalue("cluster")
        cluster.primary.fetch("CREATE DATABASE example")
        cluster.wait_caught_up()
        urls = [
            each.url("example").render_as_string(hide_password=False)
            for each in (cluster.primary, *cluster.standbys)
        ]
        variables = {"DATABASE_URL": urls[0], "REPLICA_URLS": " ".join(urls[1:])}
    client = build_opener(HTTPCookieProcessor())

    with running("replica_app.py", tmp_path, **variables) as address:

        def ask(path: str, body: bytes | None = None) -> str:
            with client.open(address + path, body, timeout=30) as response:
                text: str = response.read().decode()
                return text

        paths = [ask("/", f"text=note{number}".encode()) for number in range(10)]
        assert json.loads(ask("/")) == [f"note{number}" for number in range(10)]
        assert [ask(paths[0]) for _ in range(3)] == [f"note0, visit {n}" for n in (1, 2, 3)]
