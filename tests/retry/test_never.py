"""What is never run again: what may be committed, or was seen."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import OperationalError

from tests.retry.applications import (
    FRAMEWORKS,
    TEXT,
    Closing,
    Race,
    Restless,
    closing_app,
    file_app,
    flask_app,
    lazy_app,
    list_app,
    protect,
)
from tests.retry.commits import COMMITS
from tests.support.models import Database, Note, make_engine
from tests.support.wsgi import Server, drive, make_environ, make_registry
from wsgi_dbsession import SessionMiddleware, session_scope
from wsgi_dbsession.retry import Retry, RetryMiddleware

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from sqlalchemy.orm import Session, scoped_session

    from tests.support import postgres

pytestmark = pytest.mark.promise("never again")


def test_retry_is_an_order_to_run_again(plain: scoped_session[Session]) -> None:
    """``Retry`` needs no database error; after the last attempt it is an error like any other."""
    work = Restless()

    with pytest.raises(Retry):
        drive(protect(list_app(work), plain), "POST")

    assert work.attempts == 3


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_retry_is_obeyed_though_the_framework_made_a_page_of_it(
    framework: str, plain: scoped_session[Session]
) -> None:
    """The order counts when it is given, wherever it ends up."""

    class Subclass(Retry):
        pass

    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        if len(attempts) < 3:
            raise Subclass

    reply = drive(protect(FRAMEWORKS[framework](work), plain), "POST", b"a=b")

    assert (reply.status, reply.body, len(attempts)) == ("200 OK", b"done", 3)


@pytest.mark.parametrize("how", ["block", "empty block", "write()"])
def test_nothing_is_run_again_once_a_block_was_handed_on(
    how: str, plain: scoped_session[Session], caplog: pytest.LogCaptureFixture
) -> None:
    """The client has seen a part of the attempt, so it is final."""
    caplog.set_level(logging.INFO)
    work = Restless()

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        write = start_response("200 OK", TEXT)
        if how == "write()":
            write(b"written")
        else:
            yield b"" if how == "empty block" else b"block"
        work()

    with pytest.raises(Retry):
        drive(protect(app, plain))

    assert work.attempts == 1
    (message,) = caplog.messages
    assert message == (
        "not retrying GET /path: attempt 1 of 3 failed with Retry, "
        "but a part of its response was sent"
    )


@pytest.mark.parametrize("shape", [list_app, flask_app], ids=["raised", "error page"])
@pytest.mark.parametrize("by", COMMITS)
def test_nothing_is_run_again_once_something_was_committed(
    by: str,
    shape: Callable[[Callable[[], object]], WSGIApplication],
    postgres_database: Database,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whoever committed it, running it again would do it twice."""
    caplog.set_level(logging.INFO, "wsgi_dbsession")
    registry = make_registry(postgres_database.engine)
    work = Restless(lambda: COMMITS[by](registry))
    app = protect(shape(work), registry)

    if shape is list_app:
        with pytest.raises(Retry):
            drive(app, "POST")
    else:
        assert drive(app, "POST").status[:3] == "500"

    assert (work.attempts, postgres_database.notes()) == (1, ["kept"])
    reason = "it has committed"
    if by == "AUTOCOMMIT":
        reason = "it used a connection at AUTOCOMMIT, which may have written"
    assert (
        f"not retrying POST /path: attempt 1 of 3 failed with Retry, but {reason}"
    ) in caplog.messages


def test_nothing_is_run_again_once_another_registry_was_committed(
    serializable: scoped_session[Session],
    postgres_server: postgres.Server,
    other_postgres_database: Database,
    postgres_database: Database,
) -> None:
    """Without two phases, one may be committed when the other is refused."""
    other = make_registry(other_postgres_database.engine)
    # The first to be adopted is committed first.
    with session_scope(other):
        pass
    late = make_registry(serializable.session_factory.kw["bind"])
    race = Race(late, postgres_server, "commit")

    def work() -> None:
        other.add(Note(text="committed"))
        race.run()

    with pytest.raises(OperationalError):
        drive(protect(list_app(work), other, late), "POST")
    assert race.attempts == 1
    assert other_postgres_database.notes() == ["committed"]

    # In the other order nothing is committed when the race is lost.
    race = Race(serializable, postgres_server, "commit")
    drive(protect(list_app(work), serializable, other), "POST")
    assert race.attempts == 2
    assert other_postgres_database.notes() == ["committed", "committed"]


def test_two_phases_undo_what_another_registry_prepared(
    postgres_server: postgres.Server,
    serializable: scoped_session[Session],
    other_postgres_database: Database,
) -> None:
    """With two-phase sessions a lost race leaves nothing behind, so it is run again."""
    other = make_registry(other_postgres_database.engine, twophase=True)
    race = Race(serializable, postgres_server, "commit")

    def work() -> None:
        other.add(Note(text="committed"))
        race.run()

    assert drive(protect(list_app(work), other, serializable), "POST").body == b"done"
    assert race.attempts == 2
    assert other_postgres_database.notes() == ["committed"]


def test_a_prepared_transaction_that_was_committed_counts(
    postgres_database: Database, other_postgres_database: Database
) -> None:
    """The second phase is a commit."""
    one = make_registry(postgres_database.engine, twophase=True)
    two = make_registry(other_postgres_database.engine, twophase=True)

    def commit() -> None:
        with session_scope(one, two):
            one.add(Note(text="kept"))
            two.add(Note(text="kept"))

    work = Restless(commit)
    with pytest.raises(Retry):
        drive(protect(list_app(work), one, two), "POST")
    assert work.attempts == 1


def test_an_independent_block_that_was_rolled_back_is_no_commit(
    statement_race: Race, postgres_database: Database
) -> None:
    """What a block lost is lost, so the request may run again."""

    def work() -> None:
        with session_scope(statement_race.registry):
            statement_race.run()

    assert drive(protect(list_app(work), statement_race.registry), "POST").body == b"done"
    assert postgres_database.notes() == statement_race.done()


def test_a_savepoint_that_was_released_is_no_commit(plain: scoped_session[Session]) -> None:
    """It goes with the transaction around it."""

    def work() -> None:
        with plain.begin_nested():
            plain.execute(text("SELECT 1"))

    restless = Restless(work)
    with pytest.raises(Retry):
        drive(protect(list_app(restless), plain))
    assert restless.attempts == 3


def test_a_savepoint_that_was_rolled_back_hides_nothing(
    statement_race: Race, postgres_database: Database
) -> None:
    """The transaction around it counts all the same."""
    session = statement_race.registry
    other = postgres_database.engine

    def work() -> None:
        session.execute(
            text("INSERT INTO note (text) VALUES ('two')"), bind_arguments={"bind": other}
        )
        nested = session.begin_nested()
        nested.rollback()
        statement_race.run()

    assert drive(protect(list_app(work), session), "POST").body == b"done"


def test_a_lost_race_in_the_flush_of_the_commit_is_run_again(
    statement_race: Race, postgres_database: Database
) -> None:
    """No COMMIT was sent."""
    session = statement_race.registry

    def work() -> None:
        statement_race.attempts += 1
        note = session.scalars(select(Note)).one()
        note.text += "?"
        if statement_race.attempts == 1:
            statement_race.interfere("UPDATE note SET text = text || '!'")

    assert drive(protect(list_app(work), session), "POST").body == b"done"
    assert statement_race.attempts == 2
    assert postgres_database.notes() == ["first!?"]


def test_nothing_is_run_again_once_another_connection_of_the_session_was_committed(
    statement_race: Race, other_postgres_database: Database
) -> None:
    """One Session over two databases commits them one after the other, in no order."""
    session = statement_race.registry
    statement_race.at = "commit"

    def work() -> None:
        bind = {"bind": other_postgres_database.engine}
        session.execute(text("INSERT INTO note (text) VALUES ('once')"), bind_arguments=bind)
        statement_race.run()

    app = protect(list_app(work), session)
    with contextlib.suppress(OperationalError):
        drive(app, "POST")
        assert statement_race.attempts == 2, "the other one was not committed before"
    assert statement_race.attempts <= 2
    assert other_postgres_database.notes() == ["once"]


def test_autocommit_of_a_whole_engine_is_seen(postgres_database: Database) -> None:
    """``create_engine(isolation_level="AUTOCOMMIT")`` commits each statement."""
    engine = make_engine(postgres_database.url, isolation_level="AUTOCOMMIT")
    registry = make_registry(engine)
    work = Restless(lambda: registry.execute(text("INSERT INTO note (text) VALUES ('kept')")))

    with pytest.raises(Retry):
        drive(protect(list_app(work), registry), "POST")

    engine.dispose()
    assert (work.attempts, postgres_database.notes()) == (1, ["kept"])


@pytest.mark.parametrize("failure", [KeyboardInterrupt, SystemExit, GeneratorExit, BaseException])
@pytest.mark.parametrize("shape", [list_app, lazy_app], ids=["call", "next()"])
def test_an_interruption_is_never_run_again(
    failure: type[BaseException],
    shape: Callable[[Callable[[], object]], WSGIApplication],
    plain: scoped_session[Session],
) -> None:
    """Neither a killed greenlet nor a timeout means to be tried again."""
    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        try:
            raise Retry
        except Retry as error:
            raise failure from error

    with pytest.raises(failure):
        drive(protect(shape(work), plain))
    assert len(attempts) == 1


def test_a_request_that_is_skipped_is_left_alone(plain: scoped_session[Session]) -> None:
    """Without a scope the middleware cannot know what was committed: it passes it through."""
    work = Restless()
    app = SessionMiddleware(list_app(work), plain, skip=lambda environ: True)

    with pytest.raises(Retry):
        drive(RetryMiddleware(app))
    assert work.attempts == 1

    blocks = [b"done"]
    server = Server()
    app = SessionMiddleware(lambda environ, start: blocks, plain, skip=lambda environ: True)
    assert RetryMiddleware(app)(make_environ(), server.start_response) is blocks


def test_a_success_is_a_success(plain: scoped_session[Session]) -> None:
    """An error that the application has dealt with is not looked at."""
    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        Retry()

    assert drive(protect(list_app(work), plain)).body == b"done"
    assert len(attempts) == 1


def test_an_error_after_the_commit_is_not_run_again(
    sqlite_database: Database, notes: scoped_session[Session]
) -> None:
    """The server refuses the response's start: the work is committed all the same."""
    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        notes.add(Note(text="kept"))

    def refuse(*_: object) -> Any:
        raise Retry

    def run(app: WSGIApplication) -> None:
        result = app(make_environ("POST"), refuse)
        with contextlib.closing(result):  # type: ignore[type-var]
            list(result)

    for shape in (closing_app, file_app, list_app):
        with pytest.raises(Retry):
            run(protect(shape(work), notes))
    assert (len(attempts), Closing.closed) == (3, 1)
    assert sqlite_database.notes() == ["kept"] * 3
