"""Many clients at once, over real servers: lost races are not noticed, and nothing is lost."""

from __future__ import annotations

import hashlib
import http.client
import os
import random
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import pytest

from tests.retry.application import ACCOUNTS, MAX_BODY, SHIFTS, TABLES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from psycopg import Connection

    from tests.support.postgres import Server

pytestmark = [pytest.mark.servers, pytest.mark.promise("run again")]

ROOT = Path(__file__).parents[2]
GUNICORN = "-m gunicorn --bind fd://FD --no-control-socket --log-level warning"
SERVERS = {
    "gunicorn gthread": f"{GUNICORN} --threads 32 tests.retry.application:application",
    "gunicorn gevent": f"{GUNICORN} --worker-class gevent tests.retry.application:application",
    "gevent.pywsgi": "-m tests.retry.serve_gevent FD",
}


@dataclass(frozen=True)
class Running:
    """A server that runs, and its database."""

    port: int
    database: Connection[tuple[Any, ...]]
    protected: bool

    def request(
        self, client: http.client.HTTPConnection, path: str, **form: object
    ) -> tuple[int, bytes]:
        kind = {"Content-Type": "application/x-www-form-urlencoded"}
        client.request("POST", path, urlencode(form), kind)
        response = client.getresponse()
        return response.status, response.read()

    def fetch(self, statement: Any) -> list[tuple[Any, ...]]:
        return self.database.execute(statement).fetchall()


PROTECTED, UNPROTECTED = (
    [
        pytest.param(
            (name, protected),
            marks=pytest.mark.xdist_group(f"retry {name}"),
            id=f"{name}, {'protected' if protected else 'unprotected'}",
        )
        for name in SERVERS
    ]
    for protected in (True, False)
)


@pytest.fixture(scope="module", params=PROTECTED + UNPROTECTED)
def running(
    request: pytest.FixtureRequest, postgres_server: Server, tmp_path_factory: Any
) -> Iterator[Running]:
    """Each server in turn, with the middleware, and with a single attempt for comparison."""
    name, protected = request.param
    database = f"retry_{os.environ.get('PYTEST_XDIST_WORKER', 'main')}"
    url = postgres_server.create_database(database).render_as_string(hide_password=False)
    log = tmp_path_factory.mktemp("server") / "log"
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        port: int = listener.getsockname()[1]
        descriptor = str(listener.fileno())
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *SERVERS[name].replace("FD", descriptor).split()],
                cwd=ROOT,
                env={
                    **os.environ,
                    "DATABASE_URL": url,
                    "PROTECTED": "yes" if protected else "no",
                    "PYTHONPATH": str(ROOT),
                },
                pass_fds=[listener.fileno()],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
    with postgres_server.connect(database) as connection:
        try:
            yield Running(port, connection, protected)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    if process.returncode not in (0, -15):
        raise AssertionError(log.read_text(errors="replace"))


def run_clients(
    running: Running, count: int, run: Callable[[int, http.client.HTTPConnection], None]
) -> None:
    """Let many clients begin at the same moment, each with its own connection."""
    start = threading.Barrier(count, timeout=60)
    errors: list[BaseException] = []

    def client(number: int) -> None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=90)
            start.wait()
            run(number, connection)
            connection.close()
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=client, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def prepare(running: Running) -> None:
    """Make the tables anew."""
    running.database.execute("DROP TABLE IF EXISTS account, transfer, doctor")
    running.database.execute(TABLES)


@pytest.mark.parametrize("clients", [8, 32])
def test_money_is_neither_lost_nor_made_by_transfers(clients: int, running: Running) -> None:
    """What was acknowledged is in the database, what was refused is not, and no client gets a 500.

    Without the middleware, SERIALIZABLE keeps the money as well, but clients get errors.
    """
    prepare(running)
    replies: dict[str, int] = {}

    def client(number: int, connection: http.client.HTTPConnection) -> None:
        chance = random.Random(number)
        for each in range(64 // clients + 1):
            source, target = chance.sample(range(1, ACCOUNTS + 1), 2)
            name, amount = f"{number}/{each}", chance.randint(1, 60)
            form = {"id": name, "from": source, "to": target, "amount": amount}
            replies[name], _ = running.request(connection, "/transfer", **form)

    run_clients(running, clients, client)

    assert running.fetch("SELECT sum(balance), min(balance) >= 0 FROM account") == [
        (100 * ACCOUNTS, True)
    ]
    recorded = {name for (name,) in running.fetch("SELECT id FROM transfer")}
    assert recorded == {name for name, status in replies.items() if status == 200}
    assert recorded
    if running.protected:
        assert set(replies.values()) <= {200, 409}
    else:
        assert 500 in replies.values()


@pytest.mark.parametrize("clients", [8, 32])
def test_no_shift_is_left_without_a_doctor(clients: int, running: Running) -> None:
    """Write skew: two doctors who look at each other, and leave. Exactly one of them may."""
    prepare(running)
    replies: dict[int, int] = {}

    def client(number: int, connection: http.client.HTTPConnection) -> None:
        # The doctors of a shift are neighbours, and are asked at the same time.
        for doctor in range(number, 2 * SHIFTS, clients):
            replies[doctor], _ = running.request(connection, "/leave", doctor=doctor)

    run_clients(running, clients, client)

    left = {doctor for (doctor,) in running.fetch("SELECT id FROM doctor WHERE NOT on_call")}
    assert left == {doctor for doctor, status in replies.items() if status == 200}
    assert len({doctor // 2 for doctor in left}) == len(left), "a shift has no doctor"
    if running.protected:
        assert set(replies.values()) == {200, 409}
        assert len(left) == SHIFTS
    else:
        assert 500 in replies.values()


LARGE = random.Random(6).randbytes(MAX_BODY + 1)


@pytest.mark.parametrize("running", PROTECTED, indirect=True)
@pytest.mark.parametrize("chunked", [False, True], ids=["with a length", "chunked"])
@pytest.mark.parametrize(
    ("read", "body"),
    [
        pytest.param("all", b"x" * 70_000, id="read"),
        pytest.param("part", b"y" * 70_000, id="read in part"),
        # Small: a server may close the connection if a body is unread.
        pytest.param("nothing", b"z" * 100, id="not read"),
        pytest.param("all", LARGE, id="larger than the bound"),
    ],
)
def test_bodies_are_read_again_over_a_socket(
    read: str, body: bytes, chunked: bool, running: Running
) -> None:
    """The second attempt reads what the client sent, and the connection can be used again."""
    client = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
    parts: Iterable[bytes] = (body[i : i + 5000] for i in range(0, len(body), 5000))
    if chunked:
        client.request("POST", f"/body?{read}", parts, encode_chunked=True)
    else:
        client.request("POST", f"/body?{read}", body)
    response = client.getresponse()
    answer = response.read()

    if body is LARGE:
        assert response.status == 500
    else:
        seen = b"" if read == "nothing" else body
        assert (response.status, answer) == (200, hashlib.sha256(seen).hexdigest().encode())
    if read != "nothing" and response.status == 200:
        form = {"id": "after", "from": 1, "to": 2, "amount": 1000}
        prepare(running)
        assert running.request(client, "/transfer", **form)[0] == 409
    client.close()
