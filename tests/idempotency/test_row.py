"""The row stays in the transaction that is committed, whatever the application rolls back."""

from __future__ import annotations

import contextlib
import io
import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from wsgiref.util import FileWrapper

import pytest
from sqlalchemy import create_engine, event, text

from tests.idempotency.shop import KEYS, PATIENCE, Note, Reply, Shop, order, protect, race, user_of
from tests.support.errors import AppError, raise_error
from tests.support.wsgi import make_registry
from wsgi_dbsession import SessionMiddleware, current_scope, session_scope
from wsgi_dbsession.idempotency import Idempotency, purge

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from sqlalchemy.orm import Session, scoped_session

    from tests.idempotency.shop import Place


# -- commits of the application -------------------------------------------------------------------


def roll_back(registry: scoped_session[Session]) -> None:
    registry.rollback()


def roll_back_twice(registry: scoped_session[Session]) -> None:
    registry.rollback()
    registry.add(Note(text="never"))
    registry.flush()
    registry.rollback()


def roll_back_and_use_a_savepoint(registry: scoped_session[Session]) -> None:
    registry.rollback()
    with registry.begin_nested():
        registry.add(Note(text="in a savepoint"))


def roll_back_and_remove(registry: scoped_session[Session]) -> None:
    registry.rollback()
    registry.remove()


@pytest.mark.parametrize(
    "work", [roll_back, roll_back_twice, roll_back_and_use_a_savepoint, roll_back_and_remove]
)
def test_a_commit_after_a_rollback_keeps_the_key(
    work: Callable[[scoped_session[Session]], None], place: Place
) -> None:
    """A part was committed and the rest failed: the request is not run again."""
    registry = place.registry()
    calls = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        calls.append(environ)
        work(registry)
        registry.add(Note(text="tea"))
        registry.commit()
        raise AppError

    protected = protect(app, registry)

    with pytest.raises(AppError):
        order(protected)

    assert order(protected).code == "unfinished"
    assert len(calls) == 1
    assert place.notes().count("tea") == 1
    assert place.keys() == [None]


def test_a_commit_after_a_rollback_of_a_success_is_replayed(place: Place) -> None:
    """The response is stored in the transaction that follows, in the row of the commit."""
    registry = place.registry()

    def work(text: str) -> None:
        registry.rollback()
        registry.add(Note(text="instead"))
        registry.commit()

    shop = Shop(registry, work)
    app = protect(shop, registry)
    first = order(app)

    assert (first.status, order(app).is_replayed) == ("201 Created", True)
    assert shop.calls == 1
    assert place.notes() == ["instead"]


def test_a_rollback_after_a_commit_keeps_the_key(place: Place) -> None:
    """What is committed stays, and no later transaction needs it again."""
    registry = place.registry()

    def work(text: str) -> None:
        for _ in range(2):
            registry.commit()
            registry.add(Note(text="never"))
            registry.flush()
            registry.rollback()
        raise_error()

    app = protect(Shop(registry, work), registry)

    with pytest.raises(AppError):
        order(app)
    assert order(app).code == "unfinished"
    assert place.notes() == ["tea"]


@pytest.mark.parametrize("catches", [False, True], ids=["it fails", "it catches the error"])
def test_a_commit_after_a_rollback_fails_if_the_key_was_taken(catches: bool, place: Place) -> None:
    """Another request finished in the meantime: nothing of this one is committed."""
    registry, other = place.registry(), place.registry()
    winner = Shop(other)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        registry.rollback()
        order(protect(winner, other))
        for _ in range(2):
            registry.add(Note(text="too late"))
            try:
                registry.commit()
            except Exception:
                if not catches:
                    raise
                registry.rollback()
                with session_scope(other):  # this request must not take it again
                    purge(other, KEYS, older_than=timedelta(0))
        start_response("201 Created", [])
        return [b"paid"]

    assert order(protect(app, registry)).code == "in_progress"
    assert place.notes() == ["tea"]


def test_a_conflict_over_a_key_that_was_lost_is_a_409(postgres: Place) -> None:
    """At REPEATABLE READ, PostgreSQL reports 40001: the winner is not in the snapshot."""
    registry = postgres.registry(isolation_level="REPEATABLE READ")

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        registry.rollback()
        registry.execute(text("SELECT count(*) FROM note"))
        order(protect(Shop(registry), registry))
        start_response("201 Created", [])
        return [b"paid"]

    assert order(protect(app, registry)).code == "in_progress"
    assert postgres.notes() == ["tea"]


def test_of_two_commits_after_a_rollback_one_takes_place(place: Place) -> None:
    """Both requests have lost the key: the database gives it to the first commit."""
    registry = place.registry()
    barrier = threading.Barrier(2, timeout=PATIENCE)
    replies: list[Reply] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        registry.rollback()
        barrier.wait()
        registry.add(Note(text="tea"))
        registry.commit()
        start_response("201 Created", [])
        return [b"paid"]

    protected = protect(app, registry)
    race(2, lambda number: replies.append(order(protected)))

    assert sorted(reply.status for reply in replies) == ["201 Created", "409 Conflict"]
    assert place.notes() == ["tea"]
    assert place.keys() == ["201 Created"]


def test_what_a_hook_commits_leaves_the_key_alone(place: Place) -> None:
    """It comes after the outcome: what was rolled back can be repeated."""
    registry = place.registry()

    def log_failure() -> None:
        registry.add(Note(text="failed"))
        registry.commit()

    def work(text: str) -> None:
        current_scope().on_rollback(log_failure)

    shop = Shop(registry, work, "404 Not Found")
    app = protect(shop, registry)

    assert [order(app).status for _ in range(2)] == ["404 Not Found"] * 2
    assert shop.calls == 2
    assert (place.notes(), place.keys()) == (["failed", "failed"], [])


def test_a_commit_of_another_session_leaves_the_key_alone(sqlite: Place) -> None:
    """The row is in the database of its registry, and goes with its transactions."""
    engine = create_engine("sqlite://")
    registry, other = sqlite.registry(), make_registry(engine)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        registry.rollback()
        other.execute(text("SELECT 1"))
        other.commit()
        raise AppError

    both = SessionMiddleware(Idempotency(app, registry, KEYS, principal=user_of), registry, other)
    with pytest.raises(AppError):
        order(both)
    assert sqlite.keys() == []
    engine.dispose()


# -- savepoints -----------------------------------------------------------------------------------


def streaming(registry: scoped_session[Session], *, late: bool, rolls_back: bool) -> Any:
    """Make an application whose first block comes in a savepoint that is rolled back."""

    def stream(start_response: StartResponse) -> Iterator[bytes]:
        if rolls_back:
            registry.rollback()
        registry.add(Note(text="before"))
        registry.flush()
        with contextlib.suppress(AppError), registry.begin_nested():
            registry.add(Note(text="in a savepoint"))
            registry.flush()
            if late:
                start_response("200 OK", [])
            yield b"row 1"
            raise AppError
        yield b"row 2 is bad"
        registry.add(Note(text="after"))

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if not late:
            start_response("200 OK", [])
        return stream(start_response)

    return app


@pytest.mark.parametrize("late", [False, True], ids=["starts early", "starts late"])
@pytest.mark.parametrize("rolls_back", [False, True], ids=["keeps it", "rolls back before"])
def test_a_savepoint_that_is_rolled_back_does_not_take_the_key_along(
    late: bool, rolls_back: bool, place: Place
) -> None:
    """A stream yields in a savepoint that fails: its response is stored again after that."""
    if place.legacy:
        return  # Python's driver has no working savepoints there
    registry = place.registry()
    app = protect(streaming(registry, late=late, rolls_back=rolls_back), registry)

    assert order(app).body == b"row 1row 2 is bad"
    assert order(app).code == "not_stored"
    assert place.notes() == ["after", "before"]
    assert place.keys() == ["200 OK"]


# -- responses that were stored before ------------------------------------------------------------


def test_a_savepoint_costs_no_statement_for_the_key(
    registry: scoped_session[Session], sqlite: Place
) -> None:
    """The row is outside of it, and is written again only if it may have been rolled back."""
    statements: list[str] = []

    def work(text: str) -> None:
        for _ in range(3):
            with registry.begin_nested():
                registry.add(Note(text="in a savepoint"))

    @event.listens_for(sqlite.engines[-1], "before_cursor_execute")
    def see(*arguments: Any) -> None:
        if KEYS.name in arguments[2]:
            statements.append(arguments[2].split()[0])

    order(protect(Shop(registry, work), registry))
    assert statements == ["INSERT", "UPDATE"]


def test_a_rollback_after_a_whole_response_was_written_does_no_harm(place: Place) -> None:
    """With ``commit_on="close"`` there is time for more work, which has the key again."""
    registry = place.registry()

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("201 Created", [("Content-Length", "4")])(b"paid")
        registry.rollback()
        registry.add(Note(text="tea"))
        return []

    protected = SessionMiddleware(
        Idempotency(app, registry, KEYS, principal=user_of), registry, commit_on="close"
    )

    assert order(protected).body == b"paid"
    assert order(protected).is_replayed
    assert place.notes() == ["tea"]


def test_a_rollback_after_the_head_of_a_file_was_written_does_no_harm(place: Place) -> None:
    """No code of the application runs while the server sends the file."""
    registry = place.registry()

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("201 Created", [])(b"head")
        registry.rollback()
        registry.add(Note(text="tea"))
        result: Iterable[bytes] = environ["wsgi.file_wrapper"](io.BytesIO(b"body"))
        return result

    protected = protect(app, registry)

    server: dict[str, Any] = {"wsgi.file_wrapper": FileWrapper}
    assert order(protected, **server).body == b"headbody"
    assert order(protected).code == "not_stored"
    assert place.notes() == ["tea"]
