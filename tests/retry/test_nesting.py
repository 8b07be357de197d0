"""Requests in requests, and what the constructors refuse."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from wsgiref.validate import validator

import pytest
from sqlalchemy import text

from tests.retry.applications import SIZED, Race, Restless, list_app, protect
from tests.support.wsgi import drive
from wsgi_dbsession import SessionMiddleware
from wsgi_dbsession.retry import Retry, RetryMiddleware, run_transaction

if TYPE_CHECKING:
    from collections.abc import Iterable

    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from sqlalchemy.orm import Session, scoped_session

    from tests.support.models import Database


# -- requests in requests -------------------------------------------------------------------------


def test_the_outermost_middleware_decides(plain: scoped_session[Session]) -> None:
    """A protected application inside of another one leaves its failure to that one."""
    work = Restless()
    inner = protect(list_app(work), plain, attempts=9)

    with pytest.raises(Retry):
        drive(protect(inner, plain))

    assert work.attempts == 3


def test_a_request_in_a_request_is_a_unit_of_its_own(
    statement_race: Race, postgres_database: Database
) -> None:
    """It is run again by itself; what it committed forbids another try of the outer one."""
    outer_attempts: list[None] = []
    protected = protect(list_app(statement_race.run), statement_race.registry)

    def outer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        outer_attempts.append(None)
        assert drive(protected, **environ).body == b"done"
        raise Retry

    with pytest.raises(Retry):
        drive(protect(outer, statement_race.registry))

    assert (len(outer_attempts), statement_race.attempts) == (1, 2)
    assert postgres_database.notes() == statement_race.done()


@pytest.mark.parametrize("copied", [True, False], ids=["copied environ", "new environ"])
def test_a_lost_race_of_a_request_in_a_request_is_one_of_the_outer(
    copied: bool, race: Race, postgres_database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """Without protection of its own, its error page makes the outer one run again."""
    unprotected = SessionMiddleware(list_app(race.run), race.registry)

    def outer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        reply = drive(unprotected, "POST", **(environ if copied else {}))
        start_response(reply.status, SIZED)
        return reply.written

    assert drive(protect(outer, race.registry), "POST").body == b"done"
    assert sorted(postgres_database.notes()) == race.done()
    # The failed commit of the inner one is not known to be run again, so it is logged.
    assert len(caplog.records) == (race.at == "commit")


def test_the_same_middleware_may_be_called_in_a_request_and_without_protection(
    statement_race: Race, postgres_database: Database
) -> None:
    """A request in a request has its own outcome; without an attempt it is not recorded."""
    registry = statement_race.registry
    outer_attempts: list[None] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if "inner" not in environ:
            outer_attempts.append(None)
            reply = drive(unprotected, "POST", **{**environ, "inner": True})
            assert reply.body == b"done"
            statement_race.run()
            start_response("200 OK", SIZED)
        else:
            registry.execute(text("SELECT 1"))
            start_response("404 Not Found", SIZED)  # which commits nothing
        return [b"done"]

    unprotected = SessionMiddleware(app, registry)
    protected = RetryMiddleware(unprotected, backoff=0)
    RetryMiddleware(unprotected)  # a second time: an attempt is told once

    assert drive(protected, "POST").body == b"done"
    assert len(outer_attempts) == statement_race.attempts == 2
    assert postgres_database.notes() == statement_race.done()
    assert drive(unprotected, "POST", inner=True).body == b"done"
    assert len(unprotected.observers) == 1


# -- constructors ---------------------------------------------------------------------------------


@pytest.mark.promise("constructors")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param(
            {"attempts": 0}, ValueError, "attempts must be at least 1, got 0", id="no attempt"
        ),
        pytest.param(
            {"max_body": -1}, ValueError, "max_body must be at least 0, got -1", id="body"
        ),
        pytest.param(
            {"backoff": -1}, ValueError, "backoff must be at least 0, got -1", id="backoff"
        ),
        pytest.param({"backoff_max": -1}, ValueError, "backoff_max must be", id="largest backoff"),
        pytest.param({"timeout": -1}, ValueError, "timeout must be", id="time"),
        pytest.param({"on": Retry()}, TypeError, "on must be an exception class", id="predicate"),
    ],
)
def test_a_wrong_argument_is_refused_when_the_application_is_built(
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
    plain: scoped_session[Session],
) -> None:
    """The message names the argument and what it should be."""
    app = SessionMiddleware(list_app(lambda: None), plain)

    with pytest.raises(error, match=message):
        RetryMiddleware(app, **arguments)
    if "max_body" not in arguments:
        with pytest.raises(error, match=message):
            run_transaction(lambda: None, plain, **arguments)


@pytest.mark.promise("constructors")
def test_the_wrong_order_is_refused_when_the_application_is_built(
    plain: scoped_session[Session],
) -> None:
    """Inside of SessionMiddleware nothing can be undone, and around anything else neither."""
    app: Any = list_app(lambda: None)

    with pytest.raises(TypeError, match=r"RetryMiddleware\(SessionMiddleware\(app, Session\)\)"):
        SessionMiddleware(RetryMiddleware(app), plain)
    with pytest.raises(TypeError, match="with other middleware around both or inside of both"):
        RetryMiddleware(validator(SessionMiddleware(app, plain)))  # type: ignore[arg-type]


def test_a_middleware_inside_of_an_unprotected_scope_says_so(
    plain: scoped_session[Session],
) -> None:
    """The mistake that no constructor can see is told with the first request."""
    app = SessionMiddleware(protect(list_app(lambda: None), plain), plain)

    with pytest.raises(RuntimeError, match="Put it around the outermost"):
        drive(app)
