"""Attempts do not know each other."""

from __future__ import annotations

import gc
import io
import weakref
from typing import TYPE_CHECKING, Any
from wsgiref.util import FileWrapper

import pytest
from sqlalchemy.exc import OperationalError

from tests.retry.applications import (
    SHAPES,
    SIZED,
    TEXT,
    Closing,
    Race,
    Restless,
    lazy_app,
    list_app,
    protect,
)
from tests.support.models import Database, Note
from tests.support.wsgi import Server, drive, make_environ
from wsgi_dbsession import SessionMiddleware, current_scope
from wsgi_dbsession.retry import Retry, RetryMiddleware

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from sqlalchemy.orm import Session, scoped_session

    from tests.support.postgres import Server as PostgresServer

pytestmark = pytest.mark.promise("attempts")


def test_each_attempt_gets_the_environ_as_it_was(plain: scoped_session[Session]) -> None:
    """Neither the next attempt nor the server sees what an attempt has put there."""
    seen: list[WSGIEnvironment] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        seen.append(dict(environ))
        environ["app.user"] = "somebody"
        environ["PATH_INFO"] = "/moved"
        if len(seen) < 3:
            raise Retry
        start_response("200 OK", SIZED)
        return [b"done"]

    environ = make_environ("GET", "/path")
    before = dict(environ)
    server = Server()
    protect(app, plain)(environ, server.start_response)

    assert environ == before
    assert [each["PATH_INFO"] for each in seen] == ["/path"] * 3
    assert not any("app.user" in each for each in seen)
    scopes = [each["wsgi_dbsession.scope"] for each in seen]
    assert len({id(scope) for scope in scopes}) == 3
    assert all(scope.environ is None for scope in scopes)


@pytest.mark.parametrize(("lost", "status"), [(2, "200 OK"), (3, "503 Service Unavailable")])
def test_commit_error_answers_for_each_attempt_and_the_client_gets_the_last(
    lost: int, status: str, serializable: scoped_session[Session], postgres_server: PostgresServer
) -> None:
    """It runs where a commit fails; whether another attempt follows, it does not know."""
    answers: list[object] = []

    def apologize(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        answers.append(environ["wsgi_dbsession.attempt"])
        start_response("503 Service Unavailable", TEXT)
        return [b"sorry"]

    race = Race(serializable, postgres_server, "commit", lost=lost)
    inner = SessionMiddleware(list_app(race.run), serializable, commit_error=apologize)

    assert drive(RetryMiddleware(inner, attempts=3, backoff=0), "POST").status == status

    assert answers == list(range(1, lost + 1))


def test_hooks_follow_the_outcome_of_their_attempt(
    race: Race, postgres_database: Database
) -> None:
    """A message is sent once, for the attempt that was committed; the others are undone."""
    happened: list[str] = []

    def work() -> None:
        number = race.attempts + 1
        scope = current_scope()
        scope.on_commit(lambda: happened.append(f"commit {number}"))
        scope.on_rollback(lambda: happened.append(f"rollback {number}"))
        race.run()

    drive(protect(list_app(work), race.registry), "POST")

    assert happened == ["rollback 1", "commit 2"]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_start_of_a_failed_attempt_is_never_sent(
    shape: str, plain: scoped_session[Session]
) -> None:
    """Statuses and headers are those of the attempt that stays."""
    attempts: list[None] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        def work() -> None:
            if len(attempts) < 3:
                raise Retry

        def start(*args: Any) -> Any:
            _, headers, *rest = args
            return start_response(
                f"20{len(attempts)} OK", [*headers, ("X-Try", str(len(attempts)))], *rest
            )

        attempts.append(None)
        return SHAPES[shape](work)(environ, start)

    reply = drive(protect(app, plain))

    assert (reply.status, len(reply.starts)) == ("203 OK", 1)
    assert ("X-Try", "3") in reply.headers


def test_a_start_that_is_replaced_stays_replaced(plain: scoped_session[Session]) -> None:
    """``exc_info`` reaches the server, before and after the first block."""
    failure = ValueError("too late")

    def early(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", SIZED)
        start_response("503 Sorry", TEXT, (ValueError, failure, None))  # type: ignore[arg-type]
        return [b"sorry"]

    def late(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", TEXT)
        yield b"block"
        start_response("503 Sorry", TEXT, (ValueError, failure, None))  # type: ignore[arg-type]
        yield b"sorry"

    reply = drive(protect(early, plain))
    assert (reply.status, reply.body) == ("503 Sorry", b"sorry")
    with pytest.raises(ValueError, match="too late"):
        drive(protect(late, plain))


def test_a_second_start_without_a_reason_is_the_servers_business(
    plain: scoped_session[Session],
) -> None:
    """The server that would have refused it refuses it still."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", SIZED)
        start_response("404 Not Found", SIZED)
        return [b"done"]

    unprotected = SessionMiddleware(app, plain, skip=lambda environ: True)
    with pytest.raises(AssertionError, match="start_response was called twice"):
        drive(RetryMiddleware(unprotected))


def test_what_is_written_before_the_end_goes_out_in_order(
    notes: scoped_session[Session], sqlite_database: Database
) -> None:
    """``write()`` hands on at once, and the work is committed at the end."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        write = start_response("200 OK", TEXT)
        write(b"one ")
        notes.add(Note(text="kept"))
        write(b"two ")
        return [b"three"]

    assert drive(protect(app, notes), "POST").body == b"one two three"
    assert sqlite_database.notes() == ["kept"]


@pytest.mark.parametrize("status", ["200 OK", "204 No Content"])
def test_a_response_of_headers_only_is_run_again(
    status: str, race: Race, postgres_database: Database
) -> None:
    """A server that does not iterate over the body of a HEAD gets its start all the same."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response(status, TEXT)
        race.run()
        return Closing([b""])

    server = Server()
    result = protect(app, race.registry)(make_environ("HEAD"), server.start_response)
    result.close()

    assert (server.status, len(server.starts), race.attempts) == (status, 1, 2)
    assert sorted(postgres_database.notes()) == race.done()
    assert Closing.closed == (1 if race.at == "statement" else 2)


def test_an_error_page_of_headers_only_is_run_again(statement_race: Race) -> None:
    """The same with the 500 that a framework made of a HEAD."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        status = "200 OK"
        try:
            statement_race.run()
        except OperationalError:
            status = "500 Internal Server Error"
        start_response(status, TEXT)
        return Closing([])

    server = Server()
    protect(app, statement_race.registry)(make_environ("HEAD"), server.start_response).close()

    assert (server.status, len(server.starts), statement_race.attempts) == ("200 OK", 1, 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_last_error_comes_out_of_the_call(shape: str, race: Race) -> None:
    """Some servers answer with a 500 only what the call of the application raises."""
    race.lost = 9
    app = protect(SHAPES[shape](race.run), race.registry)

    with pytest.raises(OperationalError):
        app(make_environ(), Server().start_response)
    assert race.attempts == 3


@pytest.mark.parametrize("empty", [Closing([]), iter(())], ids=["with close()", "without"])
def test_a_body_without_blocks_is_a_whole_response(
    empty: Iterable[bytes], plain: scoped_session[Session]
) -> None:
    """The start goes out when the end is known."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", TEXT)
        return empty

    reply = drive(protect(app, plain))

    assert (reply.status, reply.written) == ("200 OK", [])


def test_attempts_may_respond_in_different_ways(plain: scoped_session[Session]) -> None:
    """The first fails in a generator, the second returns a list."""
    bodies = [lazy_app(Restless()), list_app(lambda: None)]

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        return bodies.pop(0)(environ, start_response)

    assert drive(protect(app, plain)).body == b"done"
    assert Closing.closed == 1


def test_nothing_is_run_again_for_a_client_that_has_gone(plain: scoped_session[Session]) -> None:
    """A response that is closed before its first block has no client any more."""

    class Failing(Closing):
        def close(self) -> None:
            super().close()
            raise Retry

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", SIZED)
        return Failing([b"done"])

    result = protect(app, plain)(make_environ(), Server().start_response)
    with pytest.raises(Retry):
        result.close()
    assert Closing.closed == 1


def test_a_failed_attempt_whose_close_fails_is_run_again(
    plain: scoped_session[Session], caplog: pytest.LogCaptureFixture
) -> None:
    """The error of the clean-up is logged, and does not stand in the way."""
    attempts: list[None] = []

    class Page(Closing):
        def close(self) -> None:
            super().close()
            if len(attempts) == 1:
                raise ValueError("close() failed")

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        attempts.append(None)
        if len(attempts) == 1:
            Retry()
            start_response("500 Sorry", TEXT)
        else:
            start_response("200 OK", TEXT)
        return Page([b"page"])

    reply = drive(protect(app, plain))

    assert (reply.status, reply.body) == ("200 OK", b"page")
    assert (len(attempts), Closing.closed) == (2, 2)
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert warning.exc_info is not None


def test_a_page_whose_close_commits_is_the_last_one(
    notes: scoped_session[Session], sqlite_database: Database
) -> None:
    """What runs in ``close()`` may commit, and then there is no way back."""
    attempts: list[None] = []

    class Page(Closing):
        def close(self) -> None:
            super().close()
            notes.add(Note(text="kept"))
            notes.commit()

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        attempts.append(None)
        Retry()
        start_response("500 Sorry", TEXT)
        return Page([b"page"])

    reply = drive(protect(app, notes), "POST")

    assert (reply.status, reply.body) == ("500 Sorry", b"page")
    assert (len(attempts), Closing.closed) == (1, 1)
    assert sqlite_database.notes() == ["kept"]


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_finished_response_is_handed_on_as_it_is(
    kind: type[list[bytes]], notes: scoped_session[Session]
) -> None:
    """The server gets the very list, or the file wrapper, so that its fast paths stay."""
    blocks = kind([b"done"])
    files: list[FileWrapper] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", SIZED)
        return blocks

    def send(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", SIZED)
        files.append(FileWrapper(io.BytesIO(b"done")))
        notes.add(Note(text="kept"))
        return files[-1]

    assert protect(app, notes)(make_environ(), Server().start_response) is blocks
    assert protect(send, notes)(make_environ(), Server().start_response) is files[0]


@pytest.mark.parametrize("commit_on", ["headers", "close"])
def test_other_moments_of_the_outcome_have_their_own_last_chance(
    commit_on: Any, race: Race, postgres_database: Database
) -> None:
    """What fails before the first block is run again; a COMMIT in ``close()`` comes too late."""
    app = SessionMiddleware(lazy_app(race.run), race.registry, commit_on=commit_on)

    if commit_on == "close" and race.at == "commit":
        with pytest.raises(OperationalError):
            drive(RetryMiddleware(app, backoff=0), "POST")
        assert race.attempts == 1
    else:
        assert drive(RetryMiddleware(app, backoff=0), "POST").body == b"done"
        assert sorted(postgres_database.notes()) == race.done()


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_left_behind_by_attempts(shape: str, plain: scoped_session[Session]) -> None:
    """The scopes of all attempts are freed at once, without the garbage collector."""
    scopes: list[weakref.ref[Any]] = []

    class Marker:
        pass

    def work() -> None:
        marker = Marker()
        scopes.append(weakref.ref(marker))
        current_scope().info["marker"] = marker
        if len(scopes) < 3:
            raise Retry

    gc.collect()
    gc.disable()
    try:
        assert drive(protect(SHAPES[shape](work), plain)).body == b"done"
        assert [scope() for scope in scopes] == [None] * 3
    finally:
        gc.enable()


def test_a_response_that_is_never_closed_leaves_nothing(
    sqlite_database: Database, notes: scoped_session[Session]
) -> None:
    """Once it is unreachable, its work is rolled back and its connection is returned."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        notes.add(Note(text="lost"))
        notes.flush()
        start_response("200 OK", TEXT)
        return Closing([b"one", b"two"])

    pool: Any = sqlite_database.engine.pool
    gc.disable()
    try:
        result = protect(app, notes)(make_environ("POST"), Server().start_response)
        assert pool.checkedout() == 1
        with pytest.warns(ResourceWarning, match="dropped without close"):
            del result
        assert pool.checkedout() == 0
    finally:
        gc.enable()
    assert notes.registry.registry == {}
    assert sqlite_database.notes() == []
