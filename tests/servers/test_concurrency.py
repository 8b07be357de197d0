"""Many responses at once, slow clients and clients that go away, in every server."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import TYPE_CHECKING, Any

import pytest

from .client import Connection, Seen, fetch

if TYPE_CHECKING:
    from .conftest import Observer
    from .facts import Facts
    from .fleet import Running

pytestmark = [pytest.mark.usefixtures("clean"), pytest.mark.promise("servers")]

#: seconds within which the database is free again after a client went away, while blocks are due
DISCONNECT_BOUND = 3.0


def state(running: Running) -> dict[str, Any]:
    """Ask the server's process what is left over in it."""
    loaded: dict[str, Any] = json.loads(running.fetch("/state").body)
    return loaded


def test_two_requests_on_one_connection_share_nothing(
    running: Running, observer: Observer, facts: Facts
) -> None:
    """Each of the requests on a connection has a session and a transaction of its own."""
    seen = []
    kept = "yes"
    with Connection(running.port) as connection:
        for _ in range(3):
            token = uuid.uuid4().hex
            connection.send(f"/default/identity?token={token}")
            answer = connection.receive()
            assert answer.kind == "200"
            seen.append(_own(answer, token))
            assert observer.saved(token)
            if not answer.reusable or connection.wait_closed(0.05):
                kept = "no"
                connection.close()
                connection.open()
    assert len(set(seen)) == 3
    facts.see("keep-alive", kept)


@pytest.mark.promise("requests do not meet")
def test_requests_at_once_share_nothing(running: Running, observer: Observer) -> None:
    """No session, transaction or row crosses from one of many simultaneous requests to another."""

    def client(_: int) -> list[tuple[str, int]]:
        own: list[tuple[str, int]] = []
        reused = False
        with Connection(running.port) as connection:
            while len(own) < 4:
                token = uuid.uuid4().hex
                try:
                    connection.send(f"/default/identity?token={token}")
                    answer = connection.receive()
                except OSError:
                    answer = Seen()
                if answer.kind == "200":
                    own.append((token, _own(answer, token)))
                elif not (reused and answer.kind == "no answer"):
                    # Else the server closed a connection that it kept alive just when we used it.
                    lost = running.server.loses
                    assert answer.kind == "500", running.log()
                    assert lost, running.log()
                    assert lost in running.log()
                    assert not observer.saved(token)
                reused = answer.reusable
                if not reused:
                    connection.close()
                    connection.open()
        return own

    with ThreadPoolExecutor(12) as pool:
        served = [each for client in pool.map(client, range(12)) for each in client]
    assert len({transaction for _, transaction in served}) == len(served) == 48
    assert all(observer.saved(token) for token, _ in served)


def _own(answer: Seen, token: str) -> int:
    """Check that a request saw its own session all the time; return its transaction's number."""
    told = json.loads(answer.body)
    assert told["same"], told
    assert (told["token"], told["seen"]) == (token, 1)
    number: int = told["transaction"]
    return number


def test_streams_interleave_without_mixing(
    running: Running, observer: Observer, facts: Facts
) -> None:
    """Slow responses that take turns each see their own session in every step."""
    if running.server.at_once == "one":
        facts.see("interleaved", "one at a time")
        return
    tokens = [uuid.uuid4().hex for _ in range(3)]

    def client(token: str) -> Seen:
        return running.fetch(f"/default/stream?token={token}&size=1000&blocks=12&pause=0.02")

    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(client, tokens))
    assert [answer.kind for answer in answers] == ["200"] * 3, running.log()
    assert [len(answer.body) for answer in answers] == [12000] * 3
    assert all(observer.saved(token) for token in tokens)
    if running.server.processes == 1:
        steps = [step for step in state(running)["steps"] if step[0] in tokens]
        assert len(steps) == 36
        turns = len(list(groupby(token for token, _, _ in steps)))
        assert turns > 6, "the streams did not take turns"
        threads = {thread for _, thread, _ in steps}
        if running.server.at_once == "event loop":
            assert len(threads) == 1
    facts.see("interleaved", f"in {running.server.at_once}")


def test_two_responses_stepped_in_turn_by_one_thread(
    running: Running, observer: Observer, token: str
) -> None:
    """The same within one request, as an event loop would step them: in turn, in one thread."""
    told = json.loads(running.fetch(f"/interleave?token={token}").body)
    assert told["order"][:4] == [0, 1, 0, 1]
    assert (told["scope"], told["sessions"], told["connections"]) == (False, 0, 0)
    assert observer.saved(f"{token}-0")
    assert observer.saved(f"{token}-1")


@pytest.mark.parametrize("manner", ["closes", "resets"])
def test_a_client_that_goes_away_rolls_back(
    running: Running, observer: Observer, facts: Facts, token: str, manner: str
) -> None:
    """A client disconnects in mid-stream: rolled back, and the connection is free again."""
    blocks, pause = 60, 0.05
    connection = Connection(running.port)
    connection.send(f"/default/stream?token={token}&size=20000&blocks={blocks}&pause={pause}")
    assert connection.socket.recv(1000)
    observer.wait_busy(running, 1)
    gone = time.monotonic()
    if manner == "resets":
        connection.abort()
    else:
        connection.socket.close()
    waited = observer.wait_idle(running)
    if observer.saved(token):
        # The server hid from the application that its client was gone, and let it finish.
        outcome = "hidden: the body ran to its end, committed"
    else:
        assert waited < DISCONNECT_BOUND
        outcome = "rolled back"
        facts.measure(f"disconnect seconds: {manner}", waited)
        if running.server.processes == 1:
            after = [s for s in state(running)["steps"] if s[0] == token and s[2] > gone]
            facts.measure(f"disconnect blocks: {manner}", len(after))
    facts.see(f"disconnect: {manner}", outcome)


@pytest.mark.promise("no connection held")
def test_slow_readers_hold_no_connection(
    running: Running, observer: Observer, facts: Facts, token: str
) -> None:
    """With a pool of two, 50 clients that read a finished body byte by byte stop no other."""
    server = running.server
    count = 50 if server.at_once != "one" else 3
    readers = []
    stop = threading.Event()
    try:
        for number in range(count):
            reader = Connection(running.port, receive_buffer=2048)
            reader.send(f"/narrow/large?token={token}-{number}")
            readers.append(reader)

        def read() -> None:
            while not stop.wait(0.02):
                for reader in readers:
                    reader.socket.settimeout(0)
                    with contextlib.suppress(OSError):
                        reader.socket.recv(1)

        reading = threading.Thread(target=read)
        reading.start()
        try:
            if server.at_once == "one":
                deadline = time.monotonic() + 10
                while not observer.saved(f"{token}-0"):
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
            else:
                deadline = time.monotonic() + 20
                while not all(observer.saved(f"{token}-{n}") for n in range(count)):
                    assert time.monotonic() < deadline, running.log()
                    time.sleep(0.1)
            observer.wait_idle(running)
            begin = time.monotonic()
            answer = fetch(running.port, f"/narrow/identity?token={token}", timeout=1.5)
            if server.at_once == "one" and answer.kind == "timeout":
                facts.see("slow readers", "waits for the server, not for the pool")
                assert not observer.busy(running)
            else:
                assert answer.kind == "200", running.log()
                facts.see("slow readers", "answered")
                facts.measure("slow readers seconds", time.monotonic() - begin)
        finally:
            stop.set()
            reading.join()
    finally:
        for reader in readers:
            reader.abort()


def test_streams_that_hold_the_pool_are_named_in_the_log(
    running: Running, observer: Observer, facts: Facts, token: str
) -> None:
    """With a pool of two and two streams at work on it, a third request fails, and says why."""
    if running.server.at_once == "one":
        facts.see("pool exhausted", "one at a time")
        return
    if running.server.processes > 1:
        facts.see("pool exhausted", "a pool per process")
        return
    with Connection(running.port) as one, Connection(running.port) as two:
        for number, connection in enumerate((one, two)):
            connection.send(f"/narrow/stream?token={token}-{number}&size=100&blocks=60&pause=0.05")
        observer.wait_busy(running, 2)
        answer = running.fetch(f"/narrow/identity?token={token}")
        assert answer.kind in ("500", "no answer"), running.log()
        deadline = time.monotonic() + 5
        while "QueuePool limit of size 2 overflow 0 reached" not in running.log():
            assert time.monotonic() < deadline, "the log does not say that the pool was empty"
            time.sleep(0.02)
        assert [c.receive().kind for c in (one, two)] == ["200", "200"]
    facts.see("pool exhausted", f"{answer.kind}, the log names the pool")
