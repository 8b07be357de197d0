"""The clients: each sends transfers over a raw socket, and remembers what it was told."""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import quote

from tests.servers.client import Connection, Seen
from tests.soak.databases import ACCOUNTS, TOTAL
from tests.soak.history import Transfer, Violation

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.soak.history import Told

TIMEOUT = 20.0
#: seconds in which a client that repeats its request must have an answer, after the faults
PATIENCE = 60.0


@dataclass(frozen=True)
class Shape:
    """What a request looks like."""

    mount: str
    body: str
    work: str
    weight: int = 1
    version: str = "1.1"
    #: whether the client sends it again, with the same key, until it has an answer
    repeats: bool = False
    keyed: bool = True

    def begin(self, token: str) -> Transfer:
        """Return a new transfer of this shape."""
        return Transfer(token, self.mount, self.body, self.work, self.version, 0, self.repeats)


@dataclass
class Plan:
    """What the clients of one segment do.

    :param port: returns where the server listens now; it may be another one after a crash.
    :param most: how many transfers to send, at most.
    """

    name: str
    seed: str
    port: Callable[[], int]
    shapes: Sequence[Shape]
    clients: int
    most: int
    #: how likely it is that a client hangs up, and that it reads after a success
    hang_ups: float = 0.0
    reads: float = 0.2
    #: seconds after which the application times the request out, where it has greenlets
    patience: tuple[float, float] | None = None


@dataclass
class Clients:
    """The clients of one segment, as threads; :meth:`stop` ends them."""

    plan: Plan
    transfers: list[Transfer] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)
    crashes: list[BaseException] = field(default_factory=list)
    reads: int = 0
    #: how often a client asked the application to time its request out
    impatient: int = 0

    def start(self) -> None:
        """Begin to send."""
        self._end = threading.Event()
        self._numbers = itertools.count()
        self._threads = [
            threading.Thread(target=self._run, args=[number], daemon=True)
            for number in range(self.plan.clients)
        ]
        for thread in self._threads:
            thread.start()

    def wait(self, seconds: float) -> None:
        """Wait until all transfers are sent, or the time is over."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0, deadline - time.monotonic()))

    def stop(self) -> None:
        """Let the clients finish what they have begun."""
        self._end.set()
        for thread in self._threads:
            thread.join(PATIENCE + 2 * TIMEOUT)
        if any(thread.is_alive() for thread in self._threads):
            raise AssertionError(f"{self.plan.name}: a client hangs")
        if self.crashes:
            raise AssertionError(f"{self.plan.name}: a client failed") from self.crashes[0]

    def _run(self, number: int) -> None:
        try:
            Client(self, self.plan, number).run(self._end, self._numbers)
        except BaseException as error:
            self.crashes.append(error)
            raise


class Client:
    """One client: one request after the other, on a connection that it keeps if it may."""

    def __init__(self, clients: Clients, plan: Plan, number: int) -> None:
        self._clients = clients
        self._plan = plan
        self._chance = random.Random(f"{plan.seed} client {number}")
        self._weights = [shape.weight for shape in plan.shapes]
        self._connection: Connection | None = None

    def run(self, end: threading.Event, numbers: itertools.count[int]) -> None:
        """Send transfers until the end of the segment."""
        while not end.is_set() and (number := next(numbers)) < self._plan.most:
            (shape,) = self._chance.choices(self._plan.shapes, self._weights)
            transfer = shape.begin(f"{self._plan.name.replace(' ', '-')}-{number}")
            self._clients.transfers.append(transfer)
            self._transfer(transfer, shape, end)
            if self._chance.random() < self._plan.reads:
                self._read(transfer)
        self._disconnect()

    def _transfer(self, transfer: Transfer, shape: Shape, end: threading.Event) -> None:
        source, target = self._chance.sample(range(ACCOUNTS), 2)
        path = "/".join(["", shape.mount, shape.body, quote(shape.work), transfer.token])
        path += f"?from={source}&to={target}&n={self._chance.randint(1, 9)}"
        headers = []
        if shape.repeats and shape.keyed:
            headers.append(f'Idempotency-Key: "{transfer.token}"')
        transfer.begun = time.monotonic()
        deadline: float | None = None
        while True:
            patience = self._plan.patience
            every = list(headers)
            if patience is not None and self._chance.random() < 0.05:
                self._clients.impatient += 1
                every.append(f"X-Patience: {self._chance.uniform(*patience):.4f}")
            self._send(transfer, path, every)
            if not transfer.repeats or is_final(transfer):
                break
            if end.is_set():
                deadline = deadline or time.monotonic() + PATIENCE
                if time.monotonic() > deadline:
                    break  # the checks say that it has no answer
            time.sleep(self._chance.uniform(0, 0.1))
        transfer.ended = time.monotonic()

    def _send(self, transfer: Transfer, path: str, headers: list[str]) -> None:
        transfer.told, transfer.status = "unsent", None
        try:
            connection = self._connect()
        except OSError:
            time.sleep(0.05)
            return
        transfer.tries += 1
        transfer.told = "silence"
        try:
            connection.send(path, method="POST", version=transfer.version, headers=headers)
        except OSError:
            self._disconnect()
            return
        if self._chance.random() < self._plan.hang_ups:
            self._hang_up(connection, transfer)
            return
        try:
            seen = connection.receive("POST")
        except (AssertionError, ValueError) as error:
            self._disconnect()
            transfer.told = "cut"
            self._violate("a response that is not HTTP", transfer, repr(error))
            return
        transfer.told, transfer.status = interpret(seen), seen.status
        transfer.took_effect = b'"not_stored"' in seen.body
        if not seen.reusable:
            self._disconnect()

    def _hang_up(self, connection: Connection, transfer: Transfer) -> None:
        time.sleep(self._chance.choice((0, 0.001, 0.005, 0.02)))
        connection.abort()
        self._connection = None
        transfer.told, transfer.hung_up = "cut", True

    def _read(self, transfer: Transfer) -> None:
        """Ask for the sum, and for the transfer, on another connection."""
        sure = transfer.told == "success"
        self._disconnect()
        try:
            with Connection(self._plan.port(), timeout=TIMEOUT) as connection:
                connection.send(f"/read?token={transfer.token}")
                seen = connection.receive()
        except OSError:
            return
        if not seen.success:
            return
        self._clients.reads += 1
        told = json.loads(seen.body)
        if told["total"] != TOTAL:
            self._violate("a reader saw another sum", transfer, f"{told['total']}, not {TOTAL}")
        if sure and not told["found"]:
            self._violate("success that a later reader does not see", transfer, "found 0 times")

    def _violate(self, kind: str, transfer: Transfer, more: str) -> None:
        self._clients.violations.append(Violation(kind, transfer.token, [transfer.shape, more]))

    def _connect(self) -> Connection:
        if self._connection is None:
            self._connection = Connection(self._plan.port(), timeout=TIMEOUT)
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def interpret(seen: Seen) -> Told:
    """Return what a response tells a client that knows HTTP."""
    if seen.success:
        return "success"
    if seen.status is None:
        return "silence"
    return "refusal" if seen.whole else "cut"


def is_final(transfer: Transfer) -> bool:
    """Return whether a client that repeats its request can stop.

    A whole success is the answer; so is a refusal to repeat what took effect.
    """
    return transfer.told == "success" or transfer.took_effect
