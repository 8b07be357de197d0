"""A segment: one server, its clients, its faults, and the checks at its end."""

from __future__ import annotations

import contextlib
import tempfile
import time
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.soak.checks import audit
from tests.soak.clients import Clients, Plan, Shape
from tests.soak.databases import PostgreSQL, clear, read
from tests.soak.history import Journal, Violation
from tests.soak.in_doubt import Resolver
from tests.soak.nemesis import HANG_UP, TIME_OUT, Nemesis
from tests.soak.serving import BY_NAME, WORKERS, Served
from tests.soak.shapes import ALWAYS_REFUSED
from tests.support.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.soak.databases import Database
    from tests.soak.history import Transfer
    from tests.soak.nemesis import Fault

#: the last requests of a segment, without faults: they must succeed, and leave nothing
CALM = Shape("retry", "list", "transfer")
CALM_TRANSFERS = 200
#: how often they are sent if they leave too much: the first may open connections, fill caches
CALM_ROUNDS = 3
#: how many objects more than before a request may leave; a scope alone has more
OBJECTS = 5
#: seconds in which a request can be timed out where greenlets serve it
PATIENCE = (0.001, 0.05)


@dataclass
class Setup:
    """What a segment is made of.

    :param seconds: how long transfers are sent, at most.
    :param most: how many are sent, at most.
    :param patience: how long to wait for the rest, in seconds.
    """

    name: str
    server: str
    seed: str
    shapes: Sequence[Shape]
    seconds: float
    most: int
    faults: Sequence[str] = ()
    control: str = ""
    driver: str = ""
    isolation: str = ""
    clients: int = 12
    workers: int = 0
    reads: float = 0.15
    pause: float = 0.8
    patience: float = 30.0
    calm: bool = True


@dataclass
class Result:
    """What came out of it."""

    name: str
    server: str
    configuration: str
    seconds: float = 0.0
    transfers: int = 0
    #: how often each shape was told what
    told: dict[str, dict[str, int]] = field(default_factory=dict)
    #: how often the log said that an outcome is not known
    unknown: int = 0
    #: how often each fault was made, and how many transfers failed that were under way
    faults: dict[str, int] = field(default_factory=dict)
    felt: dict[str, int] = field(default_factory=dict)
    reads: int = 0
    resolved: int = 0
    #: the largest process, in MB, and how many objects a request left
    memory: int = 0
    growth: float = 0.0
    violations: list[dict[str, Any]] = field(default_factory=list)


def run(setup: Setup, database: Database) -> Result:
    """Run a segment."""
    clear(database)
    result = Result(setup.name, setup.server, f"{setup.driver}, {setup.isolation}")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="wsgi_dbsession-") as place:
        path = Path(place) / "journal"
        path.touch()
        with contextlib.ExitStack() as stack:
            proxy = stack.enter_context(Proxy.to(database.url("bank")))
            resolver = None
            if isinstance(database, PostgreSQL):
                resolver = stack.enter_context(Resolver(database, path))
            served = _serve(setup, database, proxy, path)
            stack.callback(served.stop)
            clients, nemesis = _send(setup, served, proxy, database)
            violations = _wait_for_rest(served, database, setup.patience, result)
            calms: list[Clients] = []
            while setup.calm and len(calms) < CALM_ROUNDS:
                calms.append(_send_calm(setup, served, len(calms)))
                violations += _wait_for_rest(served, database, setup.patience, result)
                if result.growth <= OBJECTS:
                    break
            if result.growth > OBJECTS:
                history = [f"{result.growth} objects more a request, and so in each round before"]
                kind = "memory that grows with each request"
                violations.append(Violation(kind, served.server.name, history))
        if resolver is not None:
            result.resolved = resolver.resolved
        journal = Journal(path)
    transfers = list(clients.transfers)
    violations += clients.violations
    result.reads = clients.reads
    for calm in calms:
        transfers += calm.transfers
        violations += [*calm.violations, *_check_calm(calm)]
        result.reads += calm.reads
    violations += audit(transfers, journal, read(database), served.deaths)
    result.seconds = time.monotonic() - begun
    _count(result, transfers, journal)
    _count_faults(result, clients, nemesis.happened)
    result.violations = [each.asdict() for each in violations]
    return result


def _serve(setup: Setup, database: Database, proxy: Proxy, journal: Path) -> Served:
    server = BY_NAME[setup.server]
    urls = []
    for name in ("bank", "branch"):
        url = proxy.url(database.url(name))
        if setup.driver:
            url = url.set(drivername=f"{url.get_backend_name()}+{setup.driver}")
        urls.append(url.render_as_string(hide_password=False))
    environ = {
        "SOAK_BRANCH_URL": urls[1],
        "SOAK_CONTROL": setup.control,
        "SOAK_GREENLETS": server.name if server.at_once == "greenlets" else "",
        "SOAK_ISOLATION": setup.isolation,
        "SOAK_JOURNAL": str(journal),
    }
    return Served(server, setup.workers or WORKERS.get(setup.server, 1), urls[0], environ)


def _send(
    setup: Setup, served: Served, proxy: Proxy, database: Database
) -> tuple[Clients, Nemesis]:
    greenlets = served.server.at_once == "greenlets"
    plan = Plan(
        setup.name,
        setup.seed,
        served.port,
        setup.shapes,
        setup.clients,
        setup.most,
        hang_ups=0.01 if HANG_UP in setup.faults else 0,
        reads=setup.reads,
        patience=PATIENCE if TIME_OUT in setup.faults and greenlets else None,
    )
    clients = Clients(plan)
    nemesis = Nemesis(setup.faults, setup.seed, served, proxy, database, setup.pause)
    clients.start()
    nemesis.start()
    clients.wait(setup.seconds)
    nemesis.stop()
    clients.stop()
    return clients, nemesis


def _send_calm(setup: Setup, served: Served, number: int) -> Clients:
    name = f"{setup.name} calm {number}"
    clients = Clients(Plan(name, setup.seed, served.port, [CALM], 4, CALM_TRANSFERS))
    clients.start()
    clients.wait(60)
    clients.stop()
    return clients


def _check_calm(calm: Clients) -> list[Violation]:
    failed = [each for each in calm.transfers if each.told != "success"]
    if len(failed) <= len(calm.transfers) // 10:  # some are victims of a deadlock four times
        return []
    told = Counter(f"{each.told} {each.status}" for each in failed)
    return [Violation("no recovery after the faults", calm.plan.name, [str(dict(told))])]


def _wait_for_rest(
    served: Served, database: Database, seconds: float, result: Result
) -> list[Violation]:
    """Wait until no process has anything left, and return what is left all the same."""
    deadline = time.monotonic() + seconds
    while True:
        states = served.states()
        left = Counter[str]()
        for state in states:
            left.update(state["left"])
        found = [f"{name}: {count}" for name, count in left.items()] + database.busy()
        if not found:
            break
        if time.monotonic() > deadline:
            return [Violation("left over", served.server.name, found)]
        time.sleep(0.1)
    result.memory = max([result.memory, *(state["memory"] for state in states)])
    _measure_growth(served, states, result)
    return []


def _measure_growth(served: Served, states: list[dict[str, Any]], result: Result) -> None:
    """Compare how many objects there are with the last time, in the same processes."""
    before, served.objects = served.objects, {each["pid"]: each["objects"] for each in states}
    shared = [pid for pid in served.objects if pid in before]
    more = sum(served.objects[pid] - before[pid] for pid in shared)
    result.growth = more / CALM_TRANSFERS if shared else 0.0


def _count(result: Result, transfers: list[Transfer], journal: Journal) -> None:
    sent = [each for each in transfers if each.tries]
    result.transfers = len(sent)
    for transfer in sent:
        counts = result.told.setdefault(transfer.shape, {})
        counts[transfer.told] = counts.get(transfer.told, 0) + 1
    result.unknown = sum(journal.is_open(each.token) for each in sent)


def _count_faults(result: Result, clients: Clients, happened: Sequence[Fault]) -> None:
    """Count the faults, and the transfers under way that did not succeed."""
    transfers = sorted(
        (each for each in clients.transfers if each.work not in ALWAYS_REFUSED),
        key=lambda each: each.begun,
    )
    begun = [each.begun for each in transfers]
    for fault in happened:
        result.faults[fault.name] = result.faults.get(fault.name, 0) + 1
        last = bisect_right(begun, fault.ended)
        # None takes longer than a minute.
        first = bisect_right(begun, fault.begun - 60)
        failed = sum(
            each.ended >= fault.begun and each.told != "success" for each in transfers[first:last]
        )
        result.felt[fault.name] = result.felt.get(fault.name, 0) + failed
    hung_up = sum(each.hung_up for each in clients.transfers)
    for name, count in ((HANG_UP, hung_up), (TIME_OUT, clients.impatient)):
        if count:
            result.faults[name] = count
