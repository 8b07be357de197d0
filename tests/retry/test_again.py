"""A request that lost a race runs again, and its client does not notice."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING
from wsgiref.util import FileWrapper
from wsgiref.validate import validator

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError, OperationalError

from tests.retry.applications import (
    FRAMEWORKS,
    SHAPES,
    TEXT,
    Closing,
    Race,
    flask_app,
    list_app,
    protect,
)
from tests.support.models import Book, Database, Note
from tests.support.wsgi import Server, drive, make_environ
from wsgi_dbsession import SessionMiddleware
from wsgi_dbsession.retry import RetryMiddleware

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from sqlalchemy.orm import Session, scoped_session

    from tests.support import postgres

pytestmark = pytest.mark.promise("run again")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_lost_race_is_run_again_unnoticed(
    shape: str, race: Race, postgres_database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """The client gets one whole success, its work is committed once, and no error is logged."""
    caplog.set_level(logging.INFO)
    app = protect(SHAPES[shape](race.run), race.registry)

    reply = drive(app, "POST")

    assert (reply.status, reply.body, len(reply.starts)) == ("200 OK", b"done", 1)
    assert race.attempts == 2
    assert sorted(postgres_database.notes()) == race.done()
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.getMessage() == (
        "retrying POST /path: attempt 1 of 3 failed with SerializationFailure (40001), "
        "next in 0.000 s"
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_the_response_start_and_hooks_survive_the_validator(shape: str, race: Race) -> None:
    """The reference validator is silent on both sides of the middleware."""
    app = validator(protect(validator(SHAPES[shape](race.run)), race.registry))
    environ = make_environ()
    del environ["wsgi.file_wrapper"]  # the inner validator hides that it returned one
    if shape == "file wrapper":
        environ["wsgi.file_wrapper"] = FileWrapper
    environ["SCRIPT_NAME"] = ""
    server = Server()

    result = app(environ, server.start_response)
    body = b"".join(result)
    result.close()  # type: ignore[attr-defined]

    assert (server.status, body, race.attempts) == ("200 OK", b"done", 2)


@pytest.mark.parametrize("shape", ["iterable with close()", "work in the first next()"])
def test_the_response_of_each_attempt_is_closed_once(shape: str, race: Race) -> None:
    """The iterable of a failed attempt is closed, that of the last one when the server does."""
    in_call = shape == "iterable with close()" and race.at == "statement"

    drive(protect(SHAPES[shape](race.run), race.registry), "POST")

    # An attempt that failed in the call has returned no iterable.
    assert Closing.closed == (1 if in_call else 2)


@pytest.mark.parametrize("losses", [2, 3])
def test_attempts_are_counted_and_run_out(
    losses: int, race: Race, postgres_database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """Each attempt knows its number and the last one; after that the error goes to the server."""
    caplog.set_level(logging.INFO)
    race.lost = losses
    seen: list[tuple[int, int]] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        seen.append((environ["wsgi_dbsession.attempt"], environ["wsgi_dbsession.attempts"]))
        race.run()
        start_response("200 OK", TEXT)
        return [b"done"]

    if losses == 2:
        assert drive(protect(app, race.registry), "POST").body == b"done"
        assert sorted(postgres_database.notes()) == race.done()
    else:
        with pytest.raises(OperationalError):
            drive(protect(app, race.registry), "POST")
        warning = next(record for record in caplog.records if record.levelname == "WARNING")
        assert warning.getMessage() == (
            "giving up on POST /path: attempt 3 of 3 failed with SerializationFailure (40001)"
        )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert len([record for record in caplog.records if record.levelname == "INFO"]) == 2
    # The core's own line on a failed commit comes for the attempt that stays.
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == (1 if losses == 3 and race.at == "commit" else 0)


def test_one_attempt_is_no_retry(race: Race) -> None:
    """With attempts=1 the error of the first goes to the server."""
    with pytest.raises(OperationalError):
        drive(protect(list_app(race.run), race.registry, attempts=1), "POST")

    assert race.attempts == 1


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_race_that_became_an_error_page_is_run_again(
    framework: str, race: Race, postgres_database: Database
) -> None:
    """It does not matter that the framework turned the exception into a response."""
    app = FRAMEWORKS[framework](race.run)

    reply = drive(protect(app, race.registry), "POST", b"a=b")

    assert (reply.status, reply.body, race.attempts) == ("200 OK", b"done", 2)
    assert sorted(postgres_database.notes()) == race.done()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_an_error_page_made_of_anything_else_is_not_run_again(
    framework: str, serializable: scoped_session[Session]
) -> None:
    """Neither another exception nor another error of the database is worth a second try."""
    attempts: list[str] = []

    def fail() -> None:
        attempts.append("an exception")
        serializable.add(Note(text="lost"))
        raise ValueError

    def violate() -> None:
        attempts.append("a database error")
        serializable.add(Note(id=1))
        serializable.flush()

    for work in (fail, violate):
        reply = drive(protect(FRAMEWORKS[framework](work), serializable), "POST", b"a=b")
        assert reply.status[:3] == "500"
    assert attempts == ["an exception", "a database error"]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_last_error_page_is_handed_on(framework: str, race: Race) -> None:
    """When attempts run out, the client gets what the application made of the last failure."""
    race.lost = 9
    app = SessionMiddleware(FRAMEWORKS[framework](race.run), race.registry)
    if race.at == "commit":
        with pytest.raises(OperationalError):
            drive(RetryMiddleware(app, backoff=0), "POST", b"a=b")
    else:
        reply = drive(RetryMiddleware(app, backoff=0), "POST", b"a=b")
        assert reply.status[:3] == "500"
    assert race.attempts == 3


def test_a_lost_race_that_was_called_a_success_is_run_again(
    statement_race: Race, postgres_database: Database
) -> None:
    """An application that swallowed the error cannot commit, and that is why it runs again."""

    def work() -> None:
        with contextlib.suppress(OperationalError):
            statement_race.run()

    assert drive(protect(list_app(work), statement_race.registry), "POST").body == b"done"
    assert postgres_database.notes() == statement_race.done()


@pytest.mark.parametrize("shape", [list_app, flask_app], ids=["raised", "error page"])
@pytest.mark.parametrize("by", ["flush", "statement"])
def test_an_error_that_only_follows_from_the_first_does_not_hide_it(
    by: str, shape: Callable[[Callable[[], object]], WSGIApplication], statement_race: Race
) -> None:
    """What SQLAlchemy or PostgreSQL says to the statement after it is no new cause."""
    session = statement_race.registry

    def run_without_flush() -> None:
        statement_race.attempts += 1
        session.scalars(select(Note)).one()
        if statement_race.attempts == 1:
            statement_race.interfere("UPDATE note SET text = 'theirs'")
        session.execute(text("UPDATE note SET text = 'mine'"))

    def work() -> None:
        with contextlib.suppress(OperationalError):
            (statement_race.run if by == "flush" else run_without_flush)()
        # PendingRollbackError after a failed flush, "current transaction is aborted" otherwise.
        session.execute(text("SELECT 1"))

    assert drive(protect(shape(work), session), "POST").body == b"done"
    assert statement_race.attempts == 2


def test_a_later_error_of_the_database_is_the_cause(statement_race: Race) -> None:
    """A race that the application dealt with does not excuse another failure."""

    def work() -> None:
        with contextlib.suppress(OperationalError):
            statement_race.run()
        statement_race.registry.rollback()
        statement_race.registry.execute(text("INSERT INTO note VALUES (1, 'again')"))

    reply = drive(protect(flask_app(work), statement_race.registry), "POST")

    assert reply.status[:3] == "500"
    assert statement_race.attempts == 1


@pytest.mark.parametrize("where", ["inside", "around"])
def test_an_exception_that_is_handled_during_a_rollback_is_no_cause(
    where: str, statement_race: Race
) -> None:
    """The database did not report it, so a lost race that became an error page runs again."""

    def call_while_handling(function: Callable[[], object]) -> None:
        try:
            raise KeyError
        except KeyError:
            function()

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        status = "200 OK"
        try:
            statement_race.run()
        except OperationalError:
            status = "503 Service Unavailable"
            if where == "inside":
                call_while_handling(statement_race.registry.rollback)
        start_response(status, TEXT)
        return [b"done"]

    def request() -> None:
        drive(protect(app, statement_race.registry), "POST")

    if where == "around":
        call_while_handling(request)
    else:
        request()

    assert statement_race.attempts == 2


def test_what_an_error_was_caused_by_counts(statement_race: Race) -> None:
    """An application's own exception, raised from a lost race, is a lost race."""

    class SorryError(Exception):
        pass

    def work() -> None:
        try:
            statement_race.run()
        except OperationalError as error:
            raise SorryError from error

    assert drive(protect(list_app(work), statement_race.registry), "POST").body == b"done"


def test_a_commit_that_failed_for_another_reason_is_not_run_again(
    serializable: scoped_session[Session], caplog: pytest.LogCaptureFixture
) -> None:
    """A violated constraint is raised at once, and logged as an error."""
    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        serializable.add(Book(author_id=7))

    with pytest.raises(IntegrityError):
        drive(protect(list_app(work), serializable), "POST")

    assert len(attempts) == 1
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_the_answer_to_a_failed_commit_comes_after_the_last_attempt(race: Race) -> None:
    """``commit_error`` answers, if at all, for the attempt that stays."""

    def sorry(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("503 Service Unavailable", TEXT)
        return [b"sorry"]

    race.at = "commit"
    app = SessionMiddleware(list_app(race.run), race.registry, commit_error=sorry)
    assert drive(RetryMiddleware(app, backoff=0), "POST").body == b"done"
    assert race.attempts == 2

    race.lost = 9
    reply = drive(RetryMiddleware(app, backoff=0), "POST")
    assert (reply.status, race.attempts) == ("503 Service Unavailable", 5)


def test_a_deadlock_is_run_again(
    statement_race: Race, postgres_server: postgres.Server, postgres_database: Database
) -> None:
    """PostgreSQL's 40P01 is retried like a serialization failure."""
    registry = statement_race.registry
    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        registry.execute(text("SELECT pg_advisory_xact_lock(1)"))
        if len(attempts) == 1:
            # The error that PostgreSQL raises in the one of the two that it chose.
            registry.execute(text("DO $$ BEGIN RAISE SQLSTATE '40P01'; END $$"))
        registry.add(Note(text="done"))

    assert drive(protect(list_app(work), registry), "POST").body == b"done"
    assert (len(attempts), postgres_database.notes()) == (2, ["done", "first"])
