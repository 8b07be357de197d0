"""A run: the controls, then segments over all servers until the time is over."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from tests.soak import segment
from tests.soak.clients import Shape
from tests.soak.controls import CONTROLS
from tests.soak.nemesis import HANG_UP, TIME_OUT, WEIGHTS
from tests.soak.serving import BY_NAME
from tests.soak.shapes import shapes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.soak.controls import Control
    from tests.soak.databases import Database
    from tests.soak.segment import Result, Setup

SERVERS = ("gunicorn sync", "gunicorn gthread", "gunicorn gevent", "gevent.pywsgi", "waitress")
FAULTS = (*WEIGHTS, HANG_UP, TIME_OUT)
#: seconds of a segment at most, and what it needs besides: its start, its end, its checks
LONGEST, BESIDES = 60.0, 5.0
#: transfers of a segment and of a control at most
MOST, MOST_OF_CONTROL = 50_000, 150


@dataclass
class Caught:
    """What a control did."""

    name: str
    wrong: str
    kinds: dict[str, int]
    caught: bool


@dataclass
class Run:
    """What a whole run has found."""

    seed: int
    database: str
    minutes: float
    seconds: float = 0.0
    controls: list[Caught] = field(default_factory=list)
    segments: list[Result] = field(default_factory=list)

    @property
    def transfers(self) -> int:
        """How many transfers were sent, without those of the controls."""
        return sum(each.transfers for each in self.segments)

    def asdict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


def run(
    database: Database,
    *,
    minutes: float,
    seed: int,
    transfers: int = 0,
    save: Callable[[Run], object] = lambda made: None,
) -> Run:
    """Run the controls, then each server in turn.

    :param transfers: where to stop, after the round in which so many were sent; 0 is nowhere.
    :param save: called after each segment, so that a crash does not lose the whole run.
    """
    begun = time.monotonic()
    made = Run(seed, database.name, minutes)
    for control in CONTROLS:
        if not (control.postgres and database.lacks):
            made.controls.append(_run_control(control, database, seed))
            _report(made.controls[-1])
    end = begun + 60 * minutes
    for number in _rounds(end):
        share = (end - time.monotonic()) / len(SERVERS) - BESIDES
        seconds = max(3.0, min(LONGEST, share))
        for server in SERVERS:
            setup = _set_up(server, database, number, seed, seconds)
            made.segments.append(segment.run(setup, database))
            made.seconds = time.monotonic() - begun
            _report(made.segments[-1])
            save(made)
        if 0 < transfers <= made.transfers:
            break
    return made


def _rounds(end: float) -> Iterator[int]:
    """Count the rounds: one at least, and another one while there is time for a good part."""
    number = 0
    while number == 0 or end - time.monotonic() > len(SERVERS) * (BESIDES + 5):
        yield number
        number += 1


def _set_up(server: str, database: Database, number: int, seed: int, seconds: float) -> Setup:
    turn = seed + number  # short runs must not all begin with the same
    driver = database.drivers[turn % len(database.drivers)]
    if driver in BLOCKING and BY_NAME[server].at_once == "greenlets":
        driver = database.drivers[0]
    return segment.Setup(
        f"{server} {number}",
        server,
        f"{seed} {number} {server}",
        shapes(BY_NAME[server], database),
        seconds,
        MOST,
        FAULTS,
        driver=driver,
        isolation=database.isolations[turn % len(database.isolations)],
        pause=0.8 if seconds < LONGEST else 1.6,
    )


#: drivers in C that know no greenlets: one of them would stop the whole server
BLOCKING = frozenset({"psycopg2", "mysqldb"})


def _run_control(control: Control, database: Database, seed: int) -> Caught:
    setup = segment.Setup(
        control.name,
        "gunicorn gthread",
        f"{seed} {control.name}",
        [Shape(*each, repeats=control.repeats, keyed=False) for each in control.shapes],
        3,
        MOST_OF_CONTROL,
        control.faults,
        control=control.name,
        driver=database.drivers[0],
        isolation=database.isolations[0],
        clients=6,
        workers=1,
        reads=0.5,
        pause=0.1,
        patience=0.5,
        calm=control.calm,
    )
    found = segment.run(setup, database)
    kinds = dict(Counter(each["kind"] for each in found.violations))
    caught = not set(kinds).isdisjoint(control.caught_by)
    return Caught(control.name, control.wrong, kinds, caught)


def _report(done: Caught | Result) -> None:
    if isinstance(done, Caught):
        print(f"{'caught' if done.caught else 'NOT CAUGHT'}: {done.name}", flush=True)
        return
    told = Counter[str]()
    for counts in done.told.values():
        told.update(counts)
    print(
        f"{done.name} ({done.configuration}): {done.transfers} transfers in {done.seconds:.0f} s,"
        f" {told['success']} succeeded, {sum(done.faults.values())} faults,"
        f" {len(done.violations)} violations",
        flush=True,
    )
