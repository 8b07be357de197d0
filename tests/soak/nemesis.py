"""The faults: one after the other, chosen by the seed, until the segment ends."""

from __future__ import annotations

import random
import threading
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.soak.databases import Database
    from tests.soak.segment import Served
    from tests.support.proxy import Proxy


class Nemesis:
    """Makes faults in a thread of its own."""

    def __init__(
        self,
        faults: Sequence[str],
        seed: str,
        served: Served,
        proxy: Proxy,
        database: Database,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._chance = random.Random(f"{seed} nemesis")
        self._faults = faults
        self._end = threading.Event()

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass
