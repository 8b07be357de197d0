"""The faults: one after the other, chosen by the seed, until the segment ends."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from tests.servers.client import fetch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.soak.databases import Database
    from tests.soak.serving import Served
    from tests.support.proxy import Proxy

#: what clients do by themselves, see :class:`tests.soak.clients.Plan`
HANG_UP, TIME_OUT = "a client hangs up", "a greenlet times out"
#: how often a fault is chosen, compared with the others
WEIGHTS = {
    "connections are killed": 4,
    "a worker is killed": 1,
    "the database restarts": 1,
    "the network is cut": 3,
    "the network is slow": 2,
    "the answer to COMMIT is lost": 4,
    "COMMIT is lost": 3,
    "the pool is exhausted": 2,
}
HOLDERS = 10  # more than a pool has connections


class Fault(NamedTuple):
    """Something that was made to happen, and when."""

    name: str
    begun: float
    ended: float


class Nemesis:
    """Makes faults in a thread of its own.

    :param faults: names of :data:`WEIGHTS`.
    :param pause: the longest pause between two faults, in seconds.
    """

    def __init__(
        self,
        faults: Sequence[str],
        seed: str,
        served: Served,
        proxy: Proxy,
        database: Database,
        pause: float = 0.8,
    ) -> None:
        self.happened: list[Fault] = []
        self.errors: list[BaseException] = []
        self._chance = random.Random(f"{seed} nemesis")
        self._faults = [name for name in faults if name in WEIGHTS]
        self._served, self._proxy, self._database = served, proxy, database
        self._pause = pause
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._methods: dict[str, Callable[[], object]] = {
            "connections are killed": lambda: database.terminate(self._chance),
            "a worker is killed": self._kill_worker,
            "the database restarts": database.restart,
            "the network is cut": proxy.cut,
            "the network is slow": self._delay,
            "the answer to COMMIT is lost": lambda: proxy.eat_commit_answer().wait(1),
            "COMMIT is lost": lambda: proxy.eat_commit().wait(1),
            "the pool is exhausted": self._exhaust,
        }

    def start(self) -> None:
        """Begin."""
        if self._faults:
            self._thread.start()

    def stop(self) -> None:
        """End, and let everything work again."""
        self._end.set()
        if self._faults:
            self._thread.join(60)
        self._proxy.lose = "never"
        self._proxy.delay = 0
        if self.errors:
            raise AssertionError("a fault could not be made") from self.errors[0]

    def _run(self) -> None:
        weights = [WEIGHTS[name] for name in self._faults]
        try:
            while not self._end.wait(self._chance.uniform(self._pause / 10, self._pause)):
                (name,) = self._chance.choices(self._faults, weights)
                begun = time.monotonic()
                self._methods[name]()
                self.happened.append(Fault(name, begun, time.monotonic()))
        except BaseException as error:
            self.errors.append(error)
            raise

    def _kill_worker(self) -> None:
        workers = self._served.running.workers()
        if workers:
            self._served.kill(self._chance.choice(workers))

    def _delay(self) -> None:
        self._proxy.delay = self._chance.uniform(0.001, 0.02)
        self._end.wait(self._chance.uniform(0.2, 0.8))
        self._proxy.delay = 0

    def _exhaust(self) -> None:
        seconds = self._chance.uniform(0.3, 1.2)
        threads = [
            threading.Thread(target=self._hold, args=[seconds], daemon=True)
            for _ in range(HOLDERS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)

    def _hold(self, seconds: float) -> None:
        with contextlib.suppress(OSError):
            fetch(self._served.port(), f"/read?hold={seconds:.2f}")
