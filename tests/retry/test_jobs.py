"""``run_transaction``: work outside of requests runs again."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from sqlalchemy.exc import OperationalError

from tests.retry.applications import Race, Restless, list_app, protect
from tests.retry.commits import COMMITS
from tests.support.wsgi import drive, make_registry
from wsgi_dbsession.retry import Retry, run_transaction

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.orm import Session, scoped_session

    from tests.support.models import Database

pytestmark = pytest.mark.promise("jobs")


def test_a_job_that_lost_a_race_is_run_again(
    race: Race, postgres_database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """``run_transaction`` returns what the function returned in the attempt that was committed."""
    caplog.set_level(logging.INFO)

    def job() -> int:
        race.run()
        return race.attempts

    assert run_transaction(job, race.registry, backoff=0) == 2
    assert sorted(postgres_database.notes()) == race.done()
    (message,) = caplog.messages
    assert message == (
        "retrying test_a_job_that_lost_a_race_is_run_again.<locals>.job(): "
        "attempt 1 of 3 failed with SerializationFailure (40001), next in 0.000 s"
    )


def test_a_job_that_swallowed_a_lost_race_is_run_again(
    statement_race: Race, postgres_database: Database
) -> None:
    """It cannot commit, and the reason is known."""

    def job() -> None:
        with contextlib.suppress(OperationalError):
            statement_race.run()

    run_transaction(job, statement_race.registry, backoff=0)
    assert postgres_database.notes() == statement_race.done()


def test_a_job_pauses_before_each_further_attempt(
    plain: scoped_session[Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default, there are three attempts, and a pause between two of them."""
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)

    with pytest.raises(Retry):
        run_transaction(Restless(), plain)
    assert len(pauses) == 2


def test_the_number_of_attempts_may_be_large(plain: scoped_session[Session]) -> None:
    """Whoever lets ``timeout`` be the limit may have thousands."""
    attempts = 0

    def job() -> None:
        nonlocal attempts
        attempts += 1
        if attempts < 1100:
            raise Retry

    run_transaction(job, plain, attempts=10_000, backoff=0, timeout=600)
    assert attempts == 1100


@pytest.mark.parametrize(
    "call",
    [
        "run_transaction(work, Session)",
        "RetryMiddleware(SessionMiddleware(work, Session))({}, None)",
    ],
    ids=["a job", "a request"],
)
def test_the_first_one_of_a_process_sees_its_commits(call: str) -> None:
    """Whichever of the two an application uses, nothing else has to be called before."""
    script = f"""
from sqlalchemy import create_engine, text
from sqlalchemy.orm import scoped_session, sessionmaker
from wsgi_dbsession import SessionMiddleware, current_scope
from wsgi_dbsession.retry import Retry, RetryMiddleware, run_transaction

Session = scoped_session(sessionmaker(create_engine("sqlite://")), scopefunc=current_scope)

def work(*request):
    print("attempt")
    Session.execute(text("SELECT 1"))
    Session.commit()
    raise Retry

try:
    {call}
except Retry:
    print("failed")
"""
    output = subprocess.check_output([sys.executable, "-c", script], text=True)
    assert output.split() == ["attempt", "failed"]


def test_the_last_error_of_a_job_is_raised(race: Race) -> None:
    """When attempts run out, the caller hears of it."""
    race.lost = 9
    with pytest.raises(OperationalError):
        run_transaction(race.run, race.registry, attempts=4, backoff=0)
    assert race.attempts == 4


@pytest.mark.parametrize("by", [name for name in COMMITS if name != "a request in the request"])
def test_a_job_is_not_run_again_once_something_was_committed(
    by: str, postgres_database: Database
) -> None:
    """The rules are those of requests."""
    registry = make_registry(postgres_database.engine)
    work = Restless(lambda: COMMITS[by](registry))

    with pytest.raises(Retry):
        run_transaction(work, registry, backoff=0)

    assert (work.attempts, postgres_database.notes()) == (1, ["kept"])


def test_a_job_inside_of_a_request_is_a_unit_of_its_own(
    statement_race: Race, postgres_database: Database
) -> None:
    """It is run again by itself; what it committed forbids another try of the request."""
    requests: list[None] = []

    def work() -> None:
        requests.append(None)
        run_transaction(statement_race.run, statement_race.registry, backoff=0)
        raise Retry

    with pytest.raises(Retry):
        drive(protect(list_app(work), statement_race.registry), "POST")

    assert (len(requests), statement_race.attempts) == (1, 2)
    assert postgres_database.notes() == statement_race.done()


def test_a_job_that_would_run_after_its_block_is_refused(plain: scoped_session[Session]) -> None:
    """A generator function has done nothing when its call returns."""

    def job() -> Iterator[None]:
        yield

    with pytest.raises(TypeError, match="runs after its call has returned"):
        run_transaction(job, plain)
    with pytest.raises(ValueError, match="registries must not be empty"):
        run_transaction(lambda: None)
