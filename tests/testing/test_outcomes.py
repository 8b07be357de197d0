"""The outcomes of units of work are visible to tests."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import create_engine, select

from tests.support.models import Note
from tests.support.wsgi import make_registry
from tests.testing.applications import Registry, make_app, request
from wsgi_dbsession import SessionMiddleware, current_scope, session_scope
from wsgi_dbsession.testing import isolate, record_outcomes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIEnvironment

    from tests.support.models import Database

pytestmark = pytest.mark.promise("outcomes")


@pytest.fixture
def plain() -> Iterator[Registry]:
    """A registry for what has nothing to do with the database."""
    engine = create_engine("sqlite://")
    yield make_registry(engine)
    engine.dispose()


def _doom() -> None:
    current_scope().doom()


def _keep() -> None:
    current_scope().keep()


def _raise() -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("work", "status", "seen"),
    [
        pytest.param(int, "200 OK", "commit, complete", id="success"),
        pytest.param(int, "404 Not Found", "rollback, veto", id="status"),
        pytest.param(_doom, "200 OK", "rollback, doomed", id="doomed"),
        pytest.param(_keep, "403 Forbidden", "commit, kept", id="kept"),
        pytest.param(_raise, "200 OK", "rollback, error", id="error"),
    ],
)
def test_why_is_one_line(
    plain: Registry, work: Callable[[], None], status: str, seen: str
) -> None:
    """Outcome and reason of each scope are visible."""

    def use() -> None:
        plain()
        work()

    app = make_app(use, plain, status=status)
    with record_outcomes(plain) as outcomes, contextlib.suppress(ZeroDivisionError):
        request(app, "PUT")

    assert repr(outcomes) == f"[<PUT /work: {seen}>]"
    assert f"{outcomes[0].outcome}, {outcomes[0].reason}" == seen
    assert outcomes[0].ended


def test_a_scope_without_a_session_is_seen(plain: Registry) -> None:
    """There was nothing to decide, as in production."""
    with record_outcomes(plain) as outcomes:
        request(make_app(int, plain, status="404 Not Found"), "GET")

    assert repr(outcomes) == "[<GET /work: nothing to decide>]"
    assert outcomes[0].outcome is None


def test_hooks_that_ran_are_seen(plain: Registry, caplog: pytest.LogCaptureFixture) -> None:
    """Each with its own name, the failed ones too, and none that did not run."""

    def sent() -> None:
        pass

    def undone() -> None:
        pass

    with record_outcomes(plain) as outcomes:
        for doomed in (False, True):
            with session_scope(plain) as scope:
                scope.on_commit(sent)
                scope.on_commit(_raise)
                scope.on_rollback(undone)
                if doomed:
                    scope.doom()

    assert [each.hooks for each in outcomes] == [[sent, _raise], [undone]]
    assert repr(_raise) in caplog.text


def test_a_stream_may_have_more_than_one_outcome(plain: Registry) -> None:
    """What it does after its commit gets an outcome of its own."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [])
        plain.execute(select(1))
        yield b"first"
        plain.execute(select(1))
        current_scope().doom()
        yield b"second"

    with isolate(plain) as outcomes:
        request(SessionMiddleware(app, plain, commit_on="headers"), "GET")

    assert outcomes[0].settled == [("commit", "complete"), ("rollback", "doomed")]
    assert (outcomes[0].outcome, outcomes[0].reason) == ("commit", "complete")


def test_an_undecided_scope_is_seen(registry: Registry) -> None:
    """Scopes are listed in the order in which they were opened."""
    with record_outcomes(registry) as outcomes, session_scope(registry) as outer:
        with session_scope(registry):
            assert repr(outcomes) == "[<session_scope: undecided>, <session_scope: undecided>]"
        assert outcomes[0].scope is outer
        assert outcomes[1].scope is None
        assert [each.ended for each in outcomes] == [False, True]
    assert f"{__file__}:" in outcomes[0].opened


def test_a_scope_of_several_registries_is_listed_once(database: Database) -> None:
    """In each list there is, of an outer and of an inner block, whichever registry it is for."""
    one, two = make_registry(database.engine), make_registry(database.engine)
    with record_outcomes(one, two) as outer:
        with record_outcomes(two) as inner:
            for registries in ([one, two], [one], [two]):
                with session_scope(*registries):
                    pass
        with session_scope(one, two):
            pass
    with session_scope(one, two):
        pass
    assert (len(outer), len(inner)) == (4, 2)


def test_the_list_may_be_cleared(registry: Registry, caplog: pytest.LogCaptureFixture) -> None:
    """Between two looks, also while a scope is open: its record goes on."""
    with record_outcomes(registry) as outcomes:
        with session_scope(registry) as scope:
            (record,) = outcomes
            outcomes.clear()
            registry.scalars(select(Note)).all()
            scope.on_commit(int)
        assert outcomes == []
        assert (record.outcome, record.hooks, record.ended) == ("commit", [int], True)
    assert caplog.text == ""
