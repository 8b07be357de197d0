"""Random programs of requests do to the database and to the client what the design says."""

from __future__ import annotations

import contextvars
import functools
import gc
import logging
import os
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.model.programs import Do, Exchange, Hook, Plan, environ_for, name_of, plans
from tests.model.reference import Model
from tests.model.unit import Setup
from tests.model.world import STEPS, Files, Log, Place, Servers, Step, World

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.models import Database


# The same programs in each run. `HYPOTHESIS_PROFILE=night` is for others, and many of them.
settings.register_profile(
    "programs",
    max_examples=2000,
    stateful_step_count=6,
    derandomize=True,
    database=None,
    deadline=None,
    report_multiple_bugs=False,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile(
    "night", settings.get_profile("programs"), max_examples=100_000, derandomize=False
)
PROFILE = settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "programs"))
BUDGETS = pytest.mark.parametrize(
    "budget",
    [
        pytest.param(PROFILE.max_examples // 20, id="some"),
        pytest.param(PROFILE.max_examples, id="many", marks=pytest.mark.long),
    ],
)

SETUPS = st.builds(
    Setup,
    commit_on=st.sampled_from(("complete", "complete", "headers", "close")),
    commit_error=st.booleans(),
    vetoes=st.sampled_from((True, True, True, False)),
    registries=st.sampled_from((("A",), ("A", "B"), ("A", "B"))),
    nested=st.booleans(),
    twophase=st.sampled_from(((), ("A",), ("B",), ("A", "B"))),
)


class Requests(RuleBasedStateMachine):
    """Several requests, step by step, to the package and to its model."""

    databases: Files | Servers
    observed: Observed

    def __init__(self) -> None:
        super().__init__()
        self.open: list[tuple[Exchange, Exchange]] = []
        self.number = 0
        self.agreed = True

    @initialize(setup=SETUPS)
    def begin(self, setup: Setup) -> None:
        setup = self.databases.adapt(setup)
        self.world = World(setup, self.databases)
        self.model = Model(setup)

    @precondition(lambda self: len(self.open) < 3)
    @rule(plan=plans(), step=st.sampled_from(STEPS))
    def request(self, plan: Plan, step: Step) -> None:
        self.number += 1
        name = f"r{self.number}"
        self.open.append(
            (
                self.world.exchange(environ_for(plan, name)),
                self.model.exchange(environ_for(plan, name)),
            )
        )
        self.make_step(self.open[-1], step, Exchange.call)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 2), step=st.sampled_from(STEPS))
    def go_on(self, which: int, step: Step) -> None:
        pair = self.open[which % len(self.open)]
        if pair[0].goes_on():
            self.make_step(pair, step, Exchange.next)
        else:
            self.open.remove(pair)
            self.make_step(pair, step, Exchange.close)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 2), step=st.sampled_from(STEPS))
    def close(self, which: int, step: Step) -> None:
        self.make_step(self.open.pop(which % len(self.open)), step, Exchange.close)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 2), step=st.sampled_from(STEPS))
    def forget(self, which: int, step: Step) -> None:
        self.make_step(self.open.pop(which % len(self.open)), step, Exchange.forget)

    def make_step(
        self,
        pair: tuple[Exchange, Exchange],
        step: Step,
        make: Callable[[Exchange], object],
    ) -> None:
        self.agreed = False
        real, expected = pair
        self.observed.by(self.world)
        run(step, functools.partial(make, real))
        self.observed.by(self.model)
        make(expected)
        assert real.view() == expected.view()
        self.check()
        self.agreed = True

    def check(self) -> None:
        world, model = self.world, self.model
        assert [each.view() for each in world.asked] == [each.view() for each in model.asked]
        assert world.violations == []
        expected: dict[Place, list[str]] = {}
        for place, rows in model.committed.items():
            expected.setdefault(self.databases.place(place), []).extend(rows)
        committed = self.databases.committed()
        for place in expected.keys() | committed.keys():
            assert sorted(committed.get(place, [])) == sorted(expected.get(place, [])), place
        assert world.hooks_run == model.hooks_run
        assert world.log == model.log
        assert world.lost == model.lost
        assert world.sessions() == model.sessions()
        assert self.databases.checked_out() == model.connections()
        assert self.databases.prepared() == []
        assert scope_in_context() is None

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            # Hypothesis stops some programs half-way, and a complaint from here confuses it then.
            if self.agreed and sys.exc_info()[0] is None:
                while self.open:
                    self.go_on(0, "here")
                assert self.world.sessions() == 0
                assert self.databases.checked_out() == 0
            else:
                for pair in self.open:
                    for exchange in pair:
                        exchange.close()
        finally:
            if self.agreed:
                self.databases.clear()
            else:
                self.databases.dispose()
            # What Hypothesis remembers of each program would be looked at in each of the next.
            gc.freeze()


def scope_in_context() -> object:
    for variable, value in contextvars.copy_context().items():
        if variable.name == "wsgi_dbsession.scope":
            return value
    return None


def run(step: Step, make: Callable[[], object]) -> None:
    """Make a step where the server would."""
    if step == "here":
        make()
    elif step == "in another context":
        contextvars.Context().run(make)
    else:
        thread = threading.Thread(target=make)
        thread.start()
        thread.join()


class Observed:
    """What goes to the log and to ``sys.unraisablehook``, for the side that is at it."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._lost: list[str] = []

    def by(self, side: World | Model) -> None:
        self._log.lines = side.log
        self._lost = side.lost

    def lose(self, unraisable: Any) -> None:
        self._lost.append(name_of(unraisable.exc_value))


@contextmanager
def observe() -> Iterator[Observed]:
    """Hear what is logged and what is lost; not by a fixture.

    pytest keeps the records of a logger that does not propagate when the test begins, and with
    their tracebacks whatever is to be forgotten.
    """
    log = Log()
    observed = Observed(log)
    logger = logging.getLogger("wsgi_dbsession")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", observed.lose)
        patch.setattr(logger, "propagate", False)
        patch.setattr(logger, "handlers", [log])
        logger.setLevel(logging.INFO)
        try:
            yield observed
        finally:
            logger.setLevel(logging.NOTSET)


@contextmanager
def cheap_collections() -> Iterator[None]:
    """Let the collector look only at what is made from now on."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def programs_on(given: Files | Servers) -> Iterator[type[Requests]]:
    """Make the state machine whose programs use these databases."""
    with observe() as listener, cheap_collections():

        class Programs(Requests):
            databases = given
            observed = listener

        yield Programs


def run_programs(given: Files | Servers, profile: settings) -> None:
    with programs_on(given) as programs:
        run_state_machine_as_test(programs, settings=profile)


pytestmark = [
    # The application goes on with a Session whose flush failed.
    pytest.mark.filterwarnings("ignore:Session's state has been changed on a non-active"),
    # To make a program that fails a small one takes its time.
    pytest.mark.timeout(1000),
]


def test_a_hook_of_a_failed_commit_in_close_registers_another(tmp_path: Path) -> None:
    """Both run, also if no step follows; random programs found that the second did not."""
    databases = Files(tmp_path)
    hook = Hook("rollback", "register another")
    plan = Plan(body="list subclass", close=(Do("add orphan"), hook))
    try:
        with programs_on(databases) as programs:
            state = programs()
            state.begin(setup=Setup())
            state.request(plan=plan, step="here")
            state.close(step="here", which=0)
            assert state.world.hooks_run == ["r1.close.1", "r1.close.1'"]
            state.teardown()
    finally:
        databases.dispose()


@pytest.mark.promise("no false success")
@BUDGETS
def test_random_programs_on_sqlite_do_what_the_model_says(tmp_path: Path, budget: int) -> None:
    """Rows, answers, hooks, log lines, Sessions and connections are those of the model."""
    databases = Files(tmp_path)
    try:
        run_programs(databases, settings(PROFILE, max_examples=budget))
    finally:
        databases.dispose()


@pytest.mark.promise("no false success")
@BUDGETS
def test_random_programs_on_postgresql_do_what_the_model_says(
    postgres_database: Database, other_postgres_database: Database, budget: int
) -> None:
    """So they are where a failed statement spoils its transaction, and with two phases."""
    databases = Servers({"A": postgres_database, "B": other_postgres_database})
    try:
        run_programs(databases, settings(PROFILE, max_examples=budget // 5))
    finally:
        databases.close()
