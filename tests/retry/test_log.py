"""What the log says of attempts, for people and for machines."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from tests.retry.applications import Restless, flask_app, list_app, protect
from tests.support.models import make_engine
from tests.support.proxy import Proxy
from tests.support.wsgi import drive, make_registry
from wsgi_dbsession import SessionMiddleware, current_scope, session_scope
from wsgi_dbsession.retry import Retry, RetryMiddleware, run_transaction

if TYPE_CHECKING:
    from collections.abc import Iterable

    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from sqlalchemy.orm import Session, scoped_session

    from tests.support.models import Database

INSERT = text("INSERT INTO note (text) VALUES ('note')")
FIELDS = ("method", "path", "scope", "attempt", "attempts", "error", "obstacle")
REQUEST = {"method": "POST", "path": "/path", "scope": "POST /path", "attempts": 2}


def fields(record: logging.LogRecord) -> dict[str, Any]:
    return {name: vars(record)[name] for name in FIELDS if name in vars(record)}


def ours(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.module == "_policy"]


def test_a_retry_and_giving_up_are_logged(
    plain: scoped_session[Session], caplog: pytest.LogCaptureFixture
) -> None:
    """One line for each attempt that failed."""
    caplog.set_level(logging.INFO)
    with pytest.raises(Retry):
        drive(protect(list_app(Restless()), plain, attempts=2), "POST")

    retrying, giving_up = ours(caplog)
    assert retrying.getMessage() == (
        "retrying POST /path: attempt 1 of 2 failed with Retry, next in 0.000 s"
    )
    assert giving_up.getMessage() == "giving up on POST /path: attempt 2 of 2 failed with Retry"
    assert (retrying.levelname, giving_up.levelname) == ("INFO", "WARNING")
    assert fields(retrying) == {**REQUEST, "attempt": 1, "error": "Retry"}
    assert vars(retrying)["delay"] == 0
    assert fields(giving_up) == {**REQUEST, "attempt": 2, "error": "Retry"}


@pytest.mark.parametrize(
    ("status", "lines"),
    [
        pytest.param(
            "500 Internal Server Error",
            ["retrying POST", "POST /path: discarding", "giving up on POST"],
            id="an error page, which is run again once",
        ),
        pytest.param("200 OK", ["POST /path: discarding"], id="a success with a veto of its own"),
    ],
)
def test_discarded_changes_are_logged_for_the_attempt_that_stays(
    status: str,
    lines: list[str],
    plain: scoped_session[Session],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What runs again is not lost, so only the last attempt says what is."""
    caplog.set_level(logging.INFO, "wsgi_dbsession")

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        plain.execute(text("SELECT 1"))
        Retry()  # which a framework would catch
        start_response(status, [])
        return [b"page"]

    inner = SessionMiddleware(app, plain, commit_veto=lambda *_: True)
    drive(RetryMiddleware(inner, attempts=2, backoff=0), "POST")

    found = [record.getMessage() for record in caplog.records]
    assert len(found) == len(lines)
    assert all(map(str.startswith, found, lines)), found


def test_an_obstacle_is_logged(
    plain: scoped_session[Session], caplog: pytest.LogCaptureFixture
) -> None:
    """Why an error that is retryable is not retried."""
    caplog.set_level(logging.INFO)

    def commit() -> None:
        plain.execute(text("SELECT 1"))
        plain.commit()

    with pytest.raises(Retry):
        drive(protect(list_app(Restless(commit)), plain, attempts=2), "POST")

    (record,) = ours(caplog)
    assert record.getMessage() == (
        "not retrying POST /path: attempt 1 of 2 failed with Retry, but it has committed"
    )
    assert fields(record) == {
        **REQUEST,
        "attempt": 1,
        "error": "Retry",
        "obstacle": "it has committed",
    }


def test_the_path_of_a_client_forges_no_line(
    plain: scoped_session[Session], caplog: pytest.LogCaptureFixture
) -> None:
    """Control characters are escaped."""
    with pytest.raises(Retry):
        drive(protect(list_app(Restless()), plain, attempts=1), PATH_INFO="/\nroot logged in")

    (record,) = ours(caplog)
    assert "\n" not in record.getMessage()


@pytest.mark.parametrize("by", ["the application", "the middleware"])
def test_an_unknown_outcome_is_logged_once_as_an_error(
    by: str, postgres_database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """By the core for its own COMMIT, by the retry for that of the application."""
    with Proxy.to(postgres_database.url) as proxy:
        engine = make_engine(proxy.url(postgres_database.url))
        registry = make_registry(engine)

        def work() -> None:
            registry.execute(INSERT)
            if by == "the application":
                registry.commit()

        proxy.eat_commit_answer()
        if by == "the application":
            assert drive(protect(flask_app(work), registry), "POST").status[:3] == "500"
        else:
            with pytest.raises(DBAPIError):
                drive(protect(flask_app(work), registry), "POST")
        engine.dispose()

    records = [record for record in caplog.records if record.name == "wsgi_dbsession"]
    (record,) = [record for record in records if record.levelname == "ERROR"]
    assert "outcome unknown" in record.getMessage()
    assert "POST /path" in record.getMessage()
    if by == "the application":
        assert record.getMessage() == (
            "not retrying POST /path: attempt 1 of 3 lost its connection during COMMIT, "
            "outcome unknown"
        )
        assert fields(record) == {**REQUEST, "attempt": 1, "attempts": 3}


def test_an_attempt_of_a_job_that_is_retried_logs_no_error(
    postgres_database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """The core's own line on a failed commit comes for the attempt that stays."""
    caplog.set_level(logging.INFO)
    registry = make_registry(postgres_database.engine)

    def job() -> None:
        registry.execute(text("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$"))

    def swallow() -> None:
        with pytest.raises(DBAPIError):
            job()

    for each in (job, swallow):
        caplog.clear()
        with pytest.raises(SQLAlchemyError):
            run_transaction(each, registry, attempts=2, backoff=0)
        levels = [record.levelname for record in caplog.records]
        # A swallowed error makes the COMMIT fail.
        assert levels == ["INFO", *(["ERROR"] if each is swallow else []), "WARNING"]
        assert vars(ours(caplog)[0])["scope"] == f"{each.__qualname__}()"


def apologize(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    start_response("503 Service Unavailable", [])
    return [b"sorry"]


def fail_to_commit(_: object) -> None:
    raise Retry


def test_a_failed_commit_is_logged_as_an_error_if_a_hook_keeps_it_from_being_retried(
    notes: scoped_session[Session], caplog: pytest.LogCaptureFixture
) -> None:
    """The core does not log it, because another attempt was to follow."""
    caplog.set_level(logging.INFO)

    def audit() -> None:
        with session_scope(notes):
            notes.execute(INSERT)

    def work() -> None:
        notes.execute(INSERT)
        event.listen(notes(), "before_commit", fail_to_commit)
        current_scope().on_rollback(audit)

    inner = SessionMiddleware(list_app(work), notes, commit_error=apologize)
    assert drive(RetryMiddleware(inner), "POST").status[:3] == "503"

    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert record.getMessage() == (
        "not retrying POST /path: attempt 1 of 3 failed with Retry, but it has committed"
    )
    assert fields(record)["obstacle"] == "it has committed"
    assert record.exc_info is not None
    assert record.exc_info[0] is Retry


def test_a_later_error_does_not_hide_why_a_commit_failed_that_commit_error_answers(
    postgres_database: Database,
    other_postgres_database: Database,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The attempt was neither retried nor logged."""
    caplog.set_level(logging.INFO)
    registry = make_registry(postgres_database.engine)
    other = make_registry(other_postgres_database.engine)

    def swallow(session: scoped_session[Session], statement: str) -> None:
        with pytest.raises(DBAPIError):
            session.execute(text(statement))

    def work() -> None:
        swallow(registry, "DO $$ BEGIN RAISE SQLSTATE '40001'; END $$")
        swallow(other, "SELECT nonsense")
        other.rollback()

    inner = SessionMiddleware(list_app(work), registry, other, commit_error=apologize)
    app = RetryMiddleware(inner, attempts=2, backoff=0)
    assert drive(app, "POST").status[:3] == "503"

    messages = [record.getMessage() for record in ours(caplog)]
    assert len(messages) == 2
    assert messages[0].startswith("retrying POST /path: attempt 1 of 2 failed with Serialization")
    assert messages[1].startswith("giving up on POST /path: attempt 2 of 2 failed")
