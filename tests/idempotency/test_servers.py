"""Several workers of a real server: they have nothing in common but the database."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from tests.idempotency.shop import PATIENCE, Place, race
from tests.support.processes import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import URL

pytestmark = pytest.mark.servers

ROOT = Path(__file__).parents[2]
GUNICORN = "gunicorn --bind fd://FD --no-control-socket --log-level warning --graceful-timeout 5"
SERVERS = {
    "three workers": "--workers 3",
    "two workers of eight threads": "--workers 2 --threads 8",
    "two workers of greenlets": "--workers 2 --worker-class gevent",
}
CLIENTS = 12


@dataclass(frozen=True)
class Running:
    """A server that runs, and its database."""

    port: int
    place: Place

    def post(self, path: str, body: bytes, key: str, **headers: str) -> tuple[int, bytes, bool]:
        """Send a request; return status, body, and whether it was replayed."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request("POST", path, body, {"Idempotency-Key": key, **headers})
            response = connection.getresponse()
            replayed = response.getheader("Idempotent-Replayed") == "true"
            return response.status, response.read(), replayed
        finally:
            connection.close()


@pytest.fixture(params=SERVERS)
def running(request: pytest.FixtureRequest, keys_url: URL, tmp_path: Path) -> Iterator[Running]:
    """Each kind of worker in turn."""
    place = Place(keys_url, create_engine(keys_url, poolclass=NullPool))
    place.create()
    log = tmp_path / "log"
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        port: int = listener.getsockname()[1]
        command = f"{GUNICORN} {SERVERS[request.param]} tests.idempotency.application:app"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *command.replace("FD", str(listener.fileno())).split()],
                cwd=ROOT,
                env={
                    **os.environ,
                    "CRASHED": str(tmp_path / "crashed"),
                    "DATABASE_URL": keys_url.render_as_string(hide_password=False),
                    "PYTHONPATH": str(ROOT),
                },
                pass_fds=[listener.fileno()],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
    try:
        yield Running(port, place)
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        place.close()
    assert process.returncode in (0, -15), log.read_text(errors="replace")


def test_requests_to_several_workers_take_effect_once(running: Running) -> None:
    """Four keys, three requests with each, at once: four notes."""
    replies: list[tuple[int, tuple[int, bytes, bool]]] = []

    def client(number: int) -> None:
        key = number % 4
        replies.append((key, running.post("/orders", b"order %d" % key, f"key {key}")))

    race(CLIENTS, client)

    assert running.place.notes() == [f"order {key}" for key in range(4)]
    for key in range(4):
        mine = [reply for number, reply in replies if number == key]
        assert len({(status, body) for status, body, _ in mine}) == 1
        assert mine[0][0] == 201
        assert sorted(replayed for _, _, replayed in mine) == [False, True, True]


def test_each_principal_has_its_own_keys(running: Running) -> None:
    """Another token with the same key is another request."""
    replies = [
        running.post("/orders", b"tea", "key", Authorization=f"Bearer {name}")
        for name in ("ann", "bob", "ann")
    ]

    numbers: list[Any] = [json.loads(body)["number"] for _, body, _ in replies]
    assert numbers[0] == numbers[2] != numbers[1]
    assert running.place.notes() == ["tea", "tea"]


def test_a_chunked_request_has_a_fingerprint(running: Running) -> None:
    """Gunicorn ends the input where the body ends."""

    def send(*blocks: bytes) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=PATIENCE)
        try:
            connection.request(
                "POST", "/orders", iter(blocks), {"Idempotency-Key": "k"}, encode_chunked=True
            )
            response = connection.getresponse()
            response.read()
            return response.status
        finally:
            connection.close()

    assert [send(b"te", b"a"), send(b"tea"), send(b"coffee")] == [201, 201, 422]
    assert running.place.notes() == ["tea"]


def test_a_worker_that_dies_burns_no_key(running: Running) -> None:
    """The client gets no answer and repeats the request, on another worker, until it has one."""
    with pytest.raises((http.client.HTTPException, OSError)):
        running.post("/crash", b"", "key")
    replies: list[tuple[int, bytes, bool]] = []

    def has_answer() -> bool:
        replies.append(running.post("/crash", b"", "key"))
        return True

    wait_until(has_answer, "a worker answers")

    assert replies == [(201, b"survived", False)]
    assert running.post("/crash", b"", "key") == (201, b"survived", True)
    assert running.place.notes() == ["crash"]
