"""Load on a server of this machine: wrk where it is installed, else a small generator.

``python -m benchmarks.load`` is the generator, ``python -m benchmarks.load --slow`` the readers
who take their time. Both end by themselves.
"""

from __future__ import annotations

import contextlib
import json
import re
import resource
import selectors
import shutil
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

from benchmarks import report

if TYPE_CHECKING:
    from collections.abc import Iterator

LONGEST = 60  # seconds, unless it is ended before
STILL = 2.5  # seconds in which no other reader gets an answer
BITE = 1024  # bytes that a slow reader reads at a time
PAUSE = 0.5  # seconds between two of them


class Load(NamedTuple):
    """What the clients saw."""

    per_second: float  # successful ones only
    p50: float  # milliseconds
    p99: float
    failed: float  # part of the responses that were errors


def generator() -> str:
    """Name what makes the load."""
    if shutil.which("wrk"):
        return "wrk"
    report.warn("wrk is not installed, so the load comes from a slower generator in Python")
    return "a generator in Python, which is slower than wrk (not installed here),"


def load(port: int, path: str, *, clients: int, seconds: int) -> Load:
    """Let clients ask as quickly as they are answered."""
    url = f"http://127.0.0.1:{port}{path}"
    wrk = shutil.which("wrk")
    if wrk is None:
        return own_load(port, path, clients=clients, seconds=seconds)
    done = subprocess.run(
        [
            wrk,
            "--threads=1",
            f"--connections={clients}",
            f"--duration={seconds}s",
            "--latency",
            url,
        ],
        capture_output=True,
        check=True,
        text=True,
    )
    failures = re.search(r"Non-2xx or 3xx responses: (\d+)", done.stdout)
    total = re.search(r"(\d+) requests in", done.stdout)
    per_second = re.search(r"Requests/sec:\s+([\d.]+)", done.stdout)
    p50, p99 = (re.search(rf"{p}%\s+([\d.]+)(us|ms|s)", done.stdout) for p in (50, 99))
    if total is None or per_second is None or p50 is None or p99 is None:
        raise RuntimeError(f"wrk says something new: {done.stdout}")
    milliseconds = {"us": 0.001, "ms": 1, "s": 1000}
    failed = int(failures[1]) / int(total[1]) if failures else 0.0
    return Load(
        float(per_second[1]) * (1 - failed),
        float(p50[1]) * milliseconds[p50[2]],
        float(p99[1]) * milliseconds[p99[2]],
        failed,
    )


def own_load(port: int, path: str, *, clients: int, seconds: float) -> Load:
    """The same without wrk, and where most requests may get no answer at all."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.load", str(port), path, str(clients), str(seconds)],
        capture_output=True,
        check=True,
        text=True,
    )
    return Load(*json.loads(done.stdout))


@contextlib.contextmanager
def slow_readers(port: int, path: str, count: int) -> Iterator[int]:
    """Keep as many clients reading; yield how many had an answer before no other got any."""
    if not count:
        yield 0
        return
    readers = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.load", "--slow", str(port), path, str(count)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert readers.stdout is not None
        yield int(readers.stdout.readline())
    finally:
        readers.kill()
        readers.communicate()


class Client:
    """One connection that asks again and again."""

    def __init__(self, port: int, path: str) -> None:
        self._port = port
        self._request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
        self._data = b""
        self.began = 0.0
        self.socket = self._connect()

    def ask(self) -> None:
        self.began = time.perf_counter()
        self._data = b""
        self.socket.sendall(self._request)

    def take(self) -> bool | None:
        """Read; return whether a whole response was a success, None while there is none."""
        block = self.socket.recv(65536)
        self._data += block
        head, end, body = self._data.partition(b"\r\n\r\n")
        found = re.search(rb"content-length: *(\d+)", head.lower()) if end else None
        if block and (found is None or len(body) < int(found[1])):
            return None
        return head.split(b" ", 2)[1:2] == [b"200"]

    def is_over(self) -> bool:
        """Say whether the server ends the connection now, as gunicorn's sync worker does."""
        head = self._data.partition(b"\r\n\r\n")[0].lower()
        return not head or b"connection: close" in head or b"content-length" not in head

    def reconnect(self) -> None:
        self.socket.close()
        self.socket = self._connect()

    def _connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._port))


def run_load(port: int, path: str, count: int, seconds: float) -> Load:
    times: list[float] = []
    failures = 0
    selector = selectors.DefaultSelector()
    for _ in range(count):
        client = Client(port, path)
        selector.register(client.socket, selectors.EVENT_READ, client)
        client.ask()
    start = time.perf_counter()
    while (now := time.perf_counter()) < start + seconds:
        for key, _ in selector.select(start + seconds - now):
            client = key.data
            succeeded = client.take()
            if succeeded is None:
                continue
            if succeeded:
                times.append((time.perf_counter() - client.began) * 1000)
            else:
                failures += 1
            if client.is_over():
                selector.unregister(client.socket)
                client.reconnect()
                selector.register(client.socket, selectors.EVENT_READ, client)
            client.ask()
    elapsed = time.perf_counter() - start
    times.sort()
    if not times:
        return Load(0, seconds * 1000, seconds * 1000, float(failures > 0))
    return Load(
        len(times) / elapsed,
        times[len(times) // 2],
        times[len(times) * 99 // 100],
        failures / (failures + len(times)),
    )


def run_slow_readers(port: int, path: str, count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count + 50:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count + 50, hard))
    waiting = []
    for _ in range(count):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        client.setblocking(False)
        waiting.append(client)
    began = progress = time.monotonic()
    reading: set[socket.socket] = set()
    told = False
    while time.monotonic() < began + LONGEST:
        for client in waiting:
            with contextlib.suppress(BlockingIOError):
                if client.recv(BITE) and client not in reading:
                    reading.add(client)
                    progress = time.monotonic()
        if not told and (len(reading) == count or time.monotonic() > progress + STILL):
            print(len(reading), flush=True)
            told = True
        time.sleep(PAUSE if told else 0.05)


if __name__ == "__main__":
    if sys.argv[1] == "--slow":
        run_slow_readers(int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    else:
        port, path, count, seconds = sys.argv[1:]
        print(json.dumps(run_load(int(port), path, int(count), float(seconds))))
