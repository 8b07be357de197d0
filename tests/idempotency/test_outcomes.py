"""The key shares the outcome of its request: what is rolled back burns no key."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import (
    DBAPIError,
    IntegrityError,
    InvalidRequestError,
    PendingRollbackError,
    SAWarning,
    SQLAlchemyError,
)

from tests.idempotency.conftest import OTHER_DRIVERS, PLACES
from tests.idempotency.shop import KEYS, Note, Shop, order, protect, read, user_of
from tests.support.errors import AppError, Kill, doom, interrupt_by, raise_error
from tests.support.wsgi import make_registry
from wsgi_dbsession import SessionMiddleware, current_scope, session_scope
from wsgi_dbsession.idempotency import Idempotency
from wsgi_dbsession.testing import isolate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from sqlalchemy.orm import Session, scoped_session

    from tests.idempotency.shop import Place


def registry_with_a_note(place: Place) -> scoped_session[Session]:
    registry = place.registry()
    with session_scope(registry):
        registry.add(Note(id=1, text="first"))
    return registry


class Once:
    """Work that goes wrong the first time only."""

    def __init__(self, wrong: Callable[[], object]) -> None:
        self.wrong = wrong
        self.calls = 0

    def __call__(self, text: str) -> None:
        self.calls += 1
        if self.calls == 1:
            self.wrong()


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        pytest.param(raise_error, AppError, id="error"),
        pytest.param(interrupt_by(Kill()), Kill, id="interruption"),
        pytest.param(doom, None, id="doom"),
    ],
)
def test_a_request_that_is_rolled_back_burns_no_key(
    wrong: Callable[[], object], error: type[BaseException] | None, place: Place
) -> None:
    """The next try runs, and takes effect once."""
    registry = place.registry()
    app = protect(Shop(registry, Once(wrong)), registry)

    if error is None:
        order(app)
    else:
        with pytest.raises(error):
            order(app)
    assert (place.notes(), place.keys()) == ([], [])
    again = order(app)

    assert (again.status, again.is_replayed) == ("201 Created", False)
    assert order(app).is_replayed
    assert place.notes() == ["tea"]


@pytest.mark.parametrize("status", ["404 Not Found", "409 Conflict", "500 Internal Server Error"])
def test_an_error_page_burns_no_key(status: str, place: Place) -> None:
    """The veto rolls back the key with the rest."""
    registry = place.registry()
    shop = Shop(registry, status=status)
    app = protect(shop, registry)

    assert order(app).status == status
    assert (place.notes(), place.keys()) == ([], [])
    shop.status = "201 Created"
    assert not order(app).is_replayed
    assert place.notes() == ["tea"]


def test_a_commit_that_fails_burns_no_key(place: Place) -> None:
    """Whatever the reason."""
    registry = place.registry()
    app = protect(Shop(registry), registry)
    factory = registry.session_factory
    event.listen(factory, "before_commit", raise_error)

    with pytest.raises(AppError):
        order(app)
    event.remove(factory, "before_commit", raise_error)

    assert (place.notes(), place.keys()) == ([], [])
    assert not order(app).is_replayed


def streaming(registry: scoped_session[Session]) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        registry.add(Note(text=read(environ)))
        start_response("200 OK", [("Content-Type", "text/plain")])
        yield b"one"
        yield b"two"

    return app


def test_a_client_that_leaves_burns_no_key(place: Place) -> None:
    """It has not seen the whole response, so the request is rolled back."""
    registry = place.registry()
    app = protect(streaming(registry), registry)

    order(app, blocks=1)
    assert (place.notes(), place.keys()) == ([], [])
    assert order(app).body == b"onetwo"
    assert place.notes() == ["tea"]


def test_an_error_page_that_is_kept_is_replayed(place: Place) -> None:
    """A failed login that was counted is not counted again."""
    registry = place.registry()
    shop = Shop(registry, lambda text: current_scope().keep(), "403 Forbidden")
    app = protect(shop, registry)

    first = order(app)
    again = order(app)

    assert (again.status, again.body) == (first.status, first.body)
    assert again.is_replayed
    assert shop.calls == 1
    assert place.notes() == ["tea"]


def test_without_a_veto_every_response_is_stored(
    registry: scoped_session[Session], sqlite: Place
) -> None:
    """It is committed, so it must not happen twice."""
    shop = Shop(registry, status="500 Internal Server Error")
    app = SessionMiddleware(
        Idempotency(shop, registry, KEYS, principal=user_of), registry, commit_veto=None
    )

    assert order(app).body == order(app).body
    assert shop.calls == 1
    assert sqlite.keys() == ["500 Internal Server Error"]


# -- the application's own commits and rollbacks --------------------------------------------------


def test_a_commit_in_the_midst_makes_the_key_unfinished(place: Place) -> None:
    """A part was committed and the rest failed: the request is not run again."""
    registry = place.registry()
    shop = Shop(registry)

    def work(text: str) -> None:
        registry.commit()
        raise_error()

    shop.work = work
    app = protect(shop, registry)

    with pytest.raises(AppError):
        order(app)
    reply = order(app)

    assert (reply.status, reply.code) == ("409 Conflict", "unfinished")
    assert shop.calls == 1
    assert place.notes() == ["tea"]
    assert place.keys() == [None]


def test_a_commit_in_the_midst_of_a_success_does_no_harm(place: Place) -> None:
    """The response is stored in the transaction that follows."""
    registry = place.registry()
    app = protect(Shop(registry, lambda text: registry.commit()), registry)

    order(app)

    assert order(app).is_replayed
    assert place.notes() == ["tea"]


def test_a_rollback_by_the_application_does_no_harm(place: Place) -> None:
    """The row goes with it; it is inserted again, with what comes after."""
    registry = place.registry()

    def work(text: str) -> None:
        registry.rollback()
        registry.add(Note(text=f"{text} instead"))

    shop = Shop(registry, work)
    app = protect(shop, registry)
    shop_headers = order(app)

    assert shop_headers.status == "201 Created"
    assert order(app).is_replayed
    assert shop.calls == 1
    assert place.notes() == ["tea instead"]


def taken(place: Place, **options: Any) -> tuple[Any, Shop, Shop]:
    """Make an application in which another request takes the key after a rollback."""
    registry, other = place.registry(), place.registry()
    winner = Shop(other)

    def work(text: str) -> None:
        registry.rollback()
        reply = order(protect(winner, other), b"tea")
        assert reply.status == "201 Created"
        registry.add(Note(text="too late"))
        registry.flush()

    loser = Shop(registry, work)
    return protect(loser, registry, **options), loser, winner


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("status", ["201 Created", "404 Not Found"])
def test_a_key_that_was_taken_after_a_rollback_is_not_used_twice(
    status: str, wait: bool, place: Place
) -> None:
    """Another request finished in the meantime: nothing of this one may be committed."""
    app, loser, winner = taken(place, wait=wait)
    loser.status = status

    first = order(app)
    again = order(app)

    assert (first.status, first.code) == ("409 Conflict", "in_progress")
    assert again.is_replayed
    assert (loser.calls, winner.calls) == (1, 1)
    assert place.notes() == ["tea"]


def test_a_key_that_was_taken_cannot_be_kept(place: Place) -> None:
    """The application's wish to commit does not count."""
    app, loser, _ = taken(place)
    work = loser.work

    def keep(text: str) -> None:
        work(text)
        current_scope().keep()

    loser.work = keep

    assert order(app).code == "in_progress"
    assert place.notes() == ["tea"]


def test_the_transaction_has_begun_when_the_application_is_called(place: Place) -> None:
    """The application cannot begin it, and SQLAlchemy warns of another isolation level."""
    registry = place.registry()

    def work(text: str) -> None:
        with pytest.raises(InvalidRequestError, match="already begun"):
            registry.begin()
        with pytest.warns(SAWarning, match="already established"):
            registry.connection(execution_options={"isolation_level": "SERIALIZABLE"})

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        work(read(environ))
        start_response("204 No Content", [])
        return []

    assert order(protect(app, registry)).status == "204 No Content"


@pytest.mark.parametrize("name", ["sqlite", "postgres"])
def test_the_tests_of_an_application_may_undo_it(
    name: str, request: pytest.FixtureRequest
) -> None:
    """``isolate()`` takes the key back with the rest."""
    place: Place = request.getfixturevalue(name)
    registry = place.registry()
    shop = Shop(registry, Once(raise_error))
    app = protect(shop, registry)

    for _ in range(2):
        shop.work = Once(raise_error)
        with isolate(registry) as outcomes:
            with pytest.raises(AppError):
                order(app)
            assert not order(app).is_replayed
            assert order(app).is_replayed
            assert order(app, b"coffee").code == "key_reused"
        assert [each.outcome for each in outcomes] == ["rollback", "commit", "commit", "commit"]
        assert (place.notes(), place.keys()) == ([], [])


# -- errors that the application catches ----------------------------------------------------------


def fail_in_the_database(registry: scoped_session[Session]) -> None:
    registry.execute(text("SELECT nonsense FROM nowhere"))


def fail_in_a_flush(registry: scoped_session[Session]) -> None:
    registry.add(Note(id=1))
    registry.flush()


FAILURES = [fail_in_the_database, fail_in_a_flush]


def catching(
    registry: scoped_session[Session], work: Callable[[Any], object], status: str
) -> WSGIApplication:
    """Make an application that answers with this status, after an error that it caught."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        registry.add(Note(id=2, text=read(environ)))
        registry.flush()
        try:
            work(registry)
        except SQLAlchemyError:
            start_response(status, [("Content-Type", "text/plain")])
            return [b"caught"]
        raise AssertionError("it did not fail")

    return app


@pytest.mark.parametrize("work", FAILURES)
def test_an_error_page_of_a_framework_gets_through(work: Any, place: Place) -> None:
    """Flask and others turn the error of the database into a page: it is not replaced."""
    registry = registry_with_a_note(place)
    app = protect(catching(registry, work, "500 Internal Server Error"), registry)

    reply = order(app)

    assert (reply.status, reply.body) == ("500 Internal Server Error", b"caught")
    assert (place.notes(), place.keys()) == (["first"], [])


def test_an_error_page_that_is_streamed_gets_through(place: Place) -> None:
    """The key cannot be stored before it, nor between its blocks."""
    registry = registry_with_a_note(place)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        with contextlib.suppress(SQLAlchemyError):
            fail_in_a_flush(registry)
        start_response("500 Internal Server Error", [])
        return iter([b"so", b"rry"])

    assert order(protect(app, registry)).body == b"sorry"
    assert (place.notes(), place.keys()) == (["first"], [])


@pytest.mark.parametrize("status", ["201 Created", "500 Internal Server Error"])
def test_a_flush_that_failed_before_write_is_an_error(status: str, place: Place) -> None:
    """The application catches what ``write()`` raises, too; an error page gets through."""
    registry = registry_with_a_note(place)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        with contextlib.suppress(SQLAlchemyError):
            fail_in_a_flush(registry)
        write = start_response(status, [("Content-Length", "6")])
        with contextlib.suppress(SQLAlchemyError):
            for block in (b"so", b"so", b"so"):
                write(block)
        return []

    protected = protect(app, registry)

    if status == "201 Created":
        with pytest.raises(PendingRollbackError):
            order(protected)
    else:
        reply = order(protected)
        assert (reply.status, reply.body) == (status, b"sososo")
    assert (place.notes(), place.keys()) == (["first"], [])


def test_a_success_after_a_flush_that_failed_is_an_error(place: Place) -> None:
    """The Session cannot commit, so the client must not see a success."""
    registry = registry_with_a_note(place)
    app = protect(catching(registry, fail_in_a_flush, "200 OK"), registry)

    with pytest.raises(PendingRollbackError):
        order(app)
    assert (place.notes(), place.keys()) == (["first"], [])


def test_a_success_in_an_aborted_transaction_is_an_error(postgres: Place) -> None:
    """PostgreSQL would answer the COMMIT with a rollback."""
    registry = postgres.registry()
    app = protect(catching(registry, fail_in_the_database, "200 OK"), registry)

    with pytest.raises(DBAPIError, match="aborted"):
        order(app)
    assert (postgres.notes(), postgres.keys()) == ([], [])


def test_an_error_page_that_is_kept_in_an_aborted_transaction_is_an_error(
    postgres: Place,
) -> None:
    """``keep()`` promises a commit; SessionMiddleware refuses it."""
    registry = postgres.registry()

    def work(registry: Any) -> None:
        current_scope().keep()
        fail_in_the_database(registry)

    app = protect(catching(registry, work, "403 Forbidden"), registry)

    with pytest.raises(PendingRollbackError):
        order(app)
    assert (postgres.notes(), postgres.keys()) == ([], [])


def test_a_savepoint_that_failed_does_no_harm(place: Place) -> None:
    """What the application undid by itself has nothing to do with the key."""
    if place.legacy:
        return  # Python's driver has no working savepoints there
    registry = place.registry()

    def work(text: str) -> None:
        with pytest.raises(IntegrityError), registry.begin_nested():
            registry.add(Note(id=1000))

    with session_scope(registry):
        registry.add(Note(id=1000, text="first"))
    app = protect(Shop(registry, work), registry)

    assert order(app).status == "201 Created"
    assert order(app).is_replayed
    assert place.notes() == ["first", "tea"]


# SQLAlchemy's recipe for SQLite begins transactions even then.
@pytest.mark.parametrize("every_place", [*PLACES[1:], *OTHER_DRIVERS], indirect=True)
def test_without_transactions_there_are_no_keys(every_place: Place) -> None:
    """At AUTOCOMMIT a request could fail after its key was committed, so it is refused."""
    shop = Shop(every_place.registry(isolation_level="AUTOCOMMIT"))

    with pytest.raises(RuntimeError, match="must have transactions, got one at AUTOCOMMIT"):
        order(protect(shop, shop.registry))
    assert shop.calls == 0
    assert every_place.keys() == []


def test_a_missing_table_is_an_error_at_once(place: Place) -> None:
    """It is not taken for a lost race."""
    registry = place.registry()
    shop = Shop(registry)
    place.drop()

    with pytest.raises(DBAPIError, match="idempotency_key"):
        order(protect(shop, registry))
    assert shop.calls == 0


def test_a_table_that_was_changed_is_an_error(sqlite: Place) -> None:
    """A column that the middleware does not know is not taken for a lost race."""
    registry = sqlite.registry()
    with sqlite.observer.begin() as connection:
        connection.execute(text("DROP TABLE idempotency_key"))
        columns = [f'"{column.name}" TEXT' for column in KEYS.c]
        definition = ", ".join([*columns, "tenant TEXT NOT NULL"])
        connection.execute(text(f"CREATE TABLE idempotency_key ({definition})"))

    with pytest.raises(IntegrityError, match="tenant"):
        order(protect(Shop(registry), registry))
    assert sqlite.keys() == []


def test_a_session_with_several_binds_finds_the_table(sqlite: Place) -> None:
    """The table is bound like any other."""
    engine = create_engine("sqlite://")
    registry = make_registry(None, binds={Note: sqlite.engine(), KEYS: engine})
    KEYS.create(engine)
    app = protect(Shop(registry), registry)

    order(app)
    assert order(app).is_replayed

    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM idempotency_key")) == 1
    assert sqlite.notes() == ["tea"]
    engine.dispose()
