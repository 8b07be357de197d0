"""Over HTTP, with real servers, a primary and two standbys that lag, die and are promoted."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.replica.application import CookieJar
from tests.replica.tables import empty_tables
from tests.support.clusters import postgres_cluster
from tests.support.processes import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import URL

    from tests.support.clusters import PostgresCluster, PostgresServer

pytestmark = [pytest.mark.clusters, pytest.mark.xdist_group("replica HTTP")]

ROOT = Path(__file__).parents[2]
GUNICORN = "-m gunicorn --bind fd://FD --no-control-socket --log-level warning --workers 2"
SERVERS = {
    "gthread": f"{GUNICORN} --threads 8 tests.replica.served:application",
    "gevent": f"{GUNICORN} --worker-class gevent tests.replica.served:application",
}
CLIENTS = 8


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def cluster() -> Iterator[PostgresCluster]:
    """A cluster of the test's own."""
    with postgres_cluster(2) as made:
        empty_tables(made.primary.url())
        made.wait_caught_up()
        yield made


@contextlib.contextmanager
def serve(server: str, primary: URL, *standbys: URL) -> Iterator[int]:
    """Run the application, and return its port."""
    databases = [url.render_as_string(hide_password=False) for url in (primary, *standbys)]
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        descriptor = listener.fileno()
        process = subprocess.Popen(
            [sys.executable, *SERVERS[server].replace("FD", str(descriptor)).split()],
            cwd=ROOT,
            env={**os.environ, "DATABASES": json.dumps(databases), "PYTHONPATH": str(ROOT)},
            pass_fds=[descriptor],
        )
        port: int = listener.getsockname()[1]
    try:
        yield port
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    assert process.returncode in (0, -15)


@dataclass
class Load:
    """Clients that write, and read what they have written, until they are told to stop."""

    port: int
    keeps_cookies: bool = True
    pairs: int = 0
    stale: list[str] = field(default_factory=list)
    failed: Counter[int] = field(default_factory=Counter)
    read_on: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(
        self, pairs: int, *, clients: int = CLIENTS, until: threading.Event | None = None
    ) -> None:
        """Let each of the clients do its part of the pairs, or more until the event is set."""
        errors: list[BaseException] = []

        def client(number: int) -> None:
            try:
                self._client(f"/{id(self)}/{number}", pairs // clients, until)
            except BaseException as error:
                errors.append(error)
                raise

        threads = [threading.Thread(target=client, args=[number]) for number in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Let the clients go on while the block runs."""
        over = threading.Event()
        thread = threading.Thread(target=self.run, args=[0], kwargs={"until": over})
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _client(self, path: str, pairs: int, until: threading.Event | None) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        jar = CookieJar()
        written = done = 0
        while done < pairs or not (until is None or until.is_set()):
            done += 1
            status, _ = self._send(connection, jar, "POST", path)
            written += status == 200
            status, body = self._send(connection, jar, "GET", path)
            if status != 200:
                continue
            count, port = body.split()
            with self.lock:
                self.pairs += 1
                self.read_on[port] += 1
                # A failed write may have taken place all the same.
                if int(count) < written:
                    self.stale.append(f"{path}: {count} of {written} on {port}")
        connection.close()

    def _send(
        self, connection: http.client.HTTPConnection, jar: CookieJar, method: str, path: str
    ) -> tuple[int, str]:
        headers = {"Cookie": jar.header()} if self.keeps_cookies else {}
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        body = response.read().decode()
        jar.keep(response.headers.get_all("Set-Cookie", []))
        if response.status != 200:
            with self.lock:
                self.failed[response.status] += 1
        return response.status, body


@contextlib.contextmanager
def lag(standbys: list[PostgresServer], longest: float) -> Iterator[None]:
    """Stop the replay of one standby or the other, for a random while, again and again."""
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            standby = random.choice(standbys)
            standby.pause_replay()
            over.wait(random.uniform(0, longest))
            standby.resume_replay()
            over.wait(random.uniform(0, longest / 2))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_no_read_of_two_thousand_is_stale(server: str, cluster: PostgresCluster) -> None:
    """Each pair is a write and a read of all that the client has written, under lag.

    Clients that do not send their cookies see what they would miss.
    """
    standbys = cluster.standbys
    urls = [each.url() for each in standbys]
    with serve(server, cluster.primary.url(), *urls) as port, lag(standbys, 1):
        load, control = Load(port), Load(port, keeps_cookies=False)
        load.run(2000)
        control.run(200)

    assert load.failed == control.failed == {}
    print(f"{server}: {dict(load.read_on)}, without cookies {len(control.stale)} of 200 stale")
    assert load.stale == []
    assert load.pairs == 2000
    assert control.stale
    for each in (cluster.primary, *standbys):
        assert load.read_on[str(each.port)], "each server has answered"


def test_a_killed_standby_is_not_noticed(server: str, cluster: PostgresCluster) -> None:
    """Requests that were on it run again, and others do not go there; then it comes back."""
    primary, (first, second) = cluster.primary, cluster.standbys
    urls = [primary.url(), first.url(), second.url()]
    with serve(server, *urls) as port, (load := Load(port)).running():
        wait_until(lambda: load.read_on[str(first.port)], "the standby is read")
        first.kill()
        before = load.pairs
        wait_until(lambda: load.pairs > before + 100, "the others go on")
        first.start()
        load.read_on.pop(str(first.port))
        wait_until(lambda: load.read_on[str(first.port)], "the standby is read again")

    assert load.stale == []
    assert load.failed == {}


def test_a_promotion_loses_no_read(server: str, cluster: PostgresCluster) -> None:
    """The primary dies under load, and a synchronous standby takes its place.

    The other standby still follows the dead one, and is read again when it follows the new one.
    """
    primary, (first, second) = cluster.primary, cluster.standbys
    cluster.synchronous(first)
    hosts = {"host": [f"{each.host}:{each.port}" for each in (primary, first)]}
    url = (
        primary.url()
        .set(host=None, port=None)
        .update_query_dict({**hosts, "target_session_attrs": "read-write", "connect_timeout": "5"})
    )
    with serve(server, url, first.url(), second.url()) as port, (load := Load(port)).running():
        wait_until(lambda: load.pairs > 100, "the load begins")
        primary.kill()
        first.promote()
        before = load.pairs
        wait_until(lambda: load.pairs > before + 200, "the load goes on")
        cluster.follow(second, first)
        load.read_on.pop(str(second.port), None)
        wait_until(lambda: load.read_on[str(second.port)], "the other standby is read again")

    assert load.stale == []
    print(f"{server}: {load.pairs} pairs, {dict(load.failed)} failed, {dict(load.read_on)}")
