"""An exhausted pool in gunicorn, with threads and with greenlets."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from tests.servers.fleet import SERVERS, Running

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.postgres import Server as Postgres

pytestmark = pytest.mark.servers

SERVED = [each for each in SERVERS if each.name in ("gunicorn gthread", "gunicorn gevent")]
PLACE = Path(__file__).parent / "served"
PATHS = [f"/sleep/{number}" for number in range(1, 6)]


@pytest.fixture(params=SERVED, ids=lambda server: server.name)
def running(request: pytest.FixtureRequest, postgres_server: Postgres) -> Iterator[Running]:
    """A server with a pool of five connections."""
    missing = request.param.missing()
    if missing is not None:
        pytest.skip(f"NOT RUN: {missing}")
    url = postgres_server.url("postgres").set(drivername="postgresql+psycopg")
    started = Running(request.param, url.render_as_string(hide_password=False), place=PLACE)
    yield started
    started.stop()


def board(running: Running) -> Any:
    """Return what the board shows, as a client on this machine sees it."""
    request = Request(
        f"http://127.0.0.1:{running.port}/_db", headers={"Accept": "application/json"}
    )
    with urlopen(request, timeout=30) as response:
        return json.load(response)


def test_the_sixth_request_is_told_who_the_five_are(running: Running) -> None:
    """Five sleeping requests, five paths, five lines: in the error, in the log, on the board."""
    with ThreadPoolExecutor(6) as clients:
        sleeping = [clients.submit(running.fetch, path, timeout=60) for path in PATHS]
        seen = board(running)
        while len(seen["holders"]) < 5:
            seen = board(running)
        sixth = json.loads(running.fetch("/sixth", timeout=60).body)
        assert [each.result().status for each in sleeping] == [200] * 5
    logged = json.loads(running.fetch("/log").body)

    (note,) = sixth["notes"]
    (error,) = [each for each in logged if each.startswith("pool exhausted: GET /sixth waited")]
    for said in (note, error):
        for path in PATHS:
            assert f"GET {path}, held for " in said
        assert len(re.findall(r"asked at \S*/application\.py:\d+ in sleep", said)) == 5
        assert len(re.findall(r"now at \S*/application\.py:\d+ in sleep", said)) == 5
    assert sorted(each["path"] for each in seen["holders"]) == PATHS
    assert all(isinstance(each["backend_pid"], int) for each in seen["holders"])
    thread = "greenlet" if running.server.at_once == "greenlets" else "ThreadPool"
    assert all(each["thread"].startswith(thread) for each in seen["holders"])
    # One place, so one warning.
    assert len([each for each in logged if "held without a statement" in each]) == 1
    ended = {each["path"]: each for each in board(running)["ended"]}
    assert set(PATHS) < set(ended)
    assert ended["/sixth"]["waited_s"] > 0.4
    assert board(running)["holders"] == []


def test_waitress_behind_a_proxy_shows_no_board(tmp_path: Path) -> None:
    """It removes the proxy's headers, so a client of the proxy looks like a local one."""
    (waitress,) = [each for each in SERVERS if each.name == "waitress"]
    missing = waitress.missing()
    if missing is not None:
        pytest.skip(f"NOT RUN: {missing}")
    running = Running(waitress, f"sqlite:///{tmp_path / 'app.db'}", place=PLACE)
    proxied = {"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Host": "shop.example"}
    try:
        with pytest.raises(HTTPError) as caught:
            urlopen(Request(f"http://127.0.0.1:{running.port}/_db", headers=proxied), timeout=30)
        (logged,) = json.loads(running.fetch("/log").body)
    finally:
        running.stop()

    assert caught.value.code == 404
    assert logged.startswith("refusing the board at /_db: waitress removes")
