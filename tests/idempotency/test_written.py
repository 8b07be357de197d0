"""A Session that the application closes may lose the key, but not what it has written."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy
from sqlalchemy import create_engine, insert, text

from tests.idempotency.shop import KEYS, Base, Note, order, protect, user_of
from tests.support.wsgi import make_registry
from wsgi_dbsession import SessionMiddleware
from wsgi_dbsession.idempotency import Idempotency
from wsgi_dbsession.testing import isolate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from sqlalchemy.orm import Session, scoped_session

    from tests.idempotency.shop import Place


def closing(registry: scoped_session[Session], work: Callable[[Any], object]) -> WSGIApplication:
    """Make an application that removes its Session, as the teardown of many tutorials does."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        work(registry)
        registry.remove()
        start_response("201 Created", [])
        return [b"done"]

    return app


def use_nothing(registry: scoped_session[Session]) -> None:
    pass


def read(registry: scoped_session[Session]) -> None:
    registry.query(Note).all()
    registry.execute(text("/* all */ SELECT * FROM note"))
    registry.execute(text("WITH a AS (SELECT 1) SELECT * FROM a"))
    with registry.begin_nested():
        pass


def commit(registry: scoped_session[Session]) -> None:
    registry.add(Note(text="tea"))
    registry.commit()


@pytest.mark.parametrize("isolated", [False, True], ids=["in production", "in isolate"])
@pytest.mark.parametrize("work", [use_nothing, read, commit])
def test_a_teardown_that_discards_the_key_alone_does_no_harm(
    work: Callable[[Any], object],
    isolated: bool,
    place: Place,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The key is written again with the response; a WARNING names the line."""
    if isolated and (place.legacy or sqlalchemy.__version__.startswith("2.0.")):
        return  # no savepoints there, or no listeners: it is refused
    registry = place.registry()
    app = protect(closing(registry, work), registry)

    def check() -> None:
        assert order(app).status == "201 Created"
        assert order(app).is_replayed

    with caplog.at_level(logging.INFO, "wsgi_dbsession"):
        if isolated:
            with isolate(registry):
                check()
        else:
            check()
            assert place.keys() == ["201 Created"]

    expected = [] if work is commit else ["WARNING"]
    assert [record.levelname for record in caplog.records] == expected


def flush(registry: scoped_session[Session]) -> None:
    registry.add(Note(text="tea"))
    registry.flush()


def leave_pending(registry: scoped_session[Session]) -> None:
    registry.add(Note(text="tea"))


def execute(registry: scoped_session[Session]) -> None:
    registry.execute(insert(Note).values(text="tea"))


def execute_text(registry: scoped_session[Session]) -> None:
    registry.connection().execute(text("INSERT INTO note (text) VALUES ('tea')"))


@pytest.mark.parametrize("work", [flush, leave_pending, execute, execute_text])
def test_a_teardown_that_discards_what_was_written_is_refused(
    work: Callable[[Any], object], place: Place
) -> None:
    """The client must not see a success, nor may a repeated request."""
    registry = place.registry()
    app = protect(closing(registry, work), registry)

    for _ in range(2):
        with pytest.raises(RuntimeError, match="what it had written is lost"):
            order(app)
    assert (place.notes(), place.keys()) == ([], [])


def test_a_teardown_that_discards_what_was_written_before_is_refused(sqlite: Place) -> None:
    """A middleware outside of Idempotency has written in the same transaction."""
    registry = sqlite.registry()
    inner = Idempotency(closing(registry, use_nothing), registry, KEYS, principal=user_of)

    def outer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        execute(registry)
        return inner(environ, start_response)

    with pytest.raises(RuntimeError, match="what it had written is lost"):
        order(SessionMiddleware(outer, registry))


def test_a_teardown_that_discards_what_another_database_got_is_refused(sqlite: Place) -> None:
    """A Session with several binds has a connection for each."""
    engine = create_engine("sqlite://")
    registry = make_registry(None, binds={Note: sqlite.engine(), KEYS: engine})
    Base.metadata.create_all(engine)

    with pytest.raises(RuntimeError, match="what it had written is lost"):
        order(protect(closing(registry, execute), registry))
    engine.dispose()
