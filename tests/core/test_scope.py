"""Where a unit of work has its Session."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.models import Database, Note
from tests.support.wsgi import BODIES, Program, Server, make_environ
from wsgi_dbsession import (
    NoScopeError,
    Scope,
    SessionMiddleware,
    current_scope,
    find_scope,
    session_scope,
)
from wsgi_dbsession._step import scopes

if TYPE_CHECKING:
    from sqlalchemy.orm import Session, scoped_session


@pytest.mark.promise("no scope")
@pytest.mark.parametrize("fix", ["SessionMiddleware(app, Session)", "with session_scope(Session)"])
def test_no_scope_says_what_to_do(sqlite_registry: scoped_session[Session], fix: str) -> None:
    """Outside of any scope a Session is refused, and the message names the fix."""
    with pytest.raises(NoScopeError, match="no active scope") as caught:
        sqlite_registry.add(Note())

    assert fix in str(caught.value)


@pytest.mark.promise("unused")
def test_a_scope_without_work_costs_nothing(
    database: Database, registry: scoped_session[Session]
) -> None:
    """There is no Session and no connection before the first use."""
    with session_scope(registry) as scope:
        assert current_scope() is scope
        assert not registry.registry.has()

    assert scope.outcome is None
    assert database.engine.pool.status().startswith("Pool size: 5  Connections in pool: 0 ")


@pytest.mark.promise("requests do not meet")
def test_a_scope_has_one_session_and_its_own(sqlite_registry: scoped_session[Session]) -> None:
    """The Session is the same within a scope, and another in the next."""
    with session_scope(sqlite_registry):
        first = sqlite_registry()
        assert sqlite_registry() is first
    with session_scope(sqlite_registry):
        assert sqlite_registry() is not first


def test_a_scope_tells_about_itself() -> None:
    """Its repr says what it is of, and what became of it."""
    scope = Scope(make_environ("POST", "/notes", SCRIPT_NAME="/app"))
    assert repr(scope) == f"<Scope of POST /app/notes at {id(scope):#x}: undecided>"

    scope.enter()
    assert current_scope() is scope
    scope.close()
    scope.leave()

    assert repr(scope) == f"<Scope of a request that is over at {id(scope):#x}: undecided>"


def test_a_scope_tells_about_its_outcome(sqlite_registry: scoped_session[Session]) -> None:
    """That of a block has its name."""
    with session_scope(sqlite_registry, name="nightly") as scope:
        sqlite_registry()

    assert repr(scope) == f"<Scope of nightly at {id(scope):#x}: commit>"


def test_a_request_carries_its_scope(sqlite_registry: scoped_session[Session]) -> None:
    """The environ has the scope, the scope has the environ while the request lasts, and info."""
    environ = make_environ()
    scopes: list[Scope] = []

    def early() -> None:
        scope = current_scope()
        scopes.append(scope)
        assert environ["wsgi_dbsession.scope"] is scope
        assert scope.environ is environ
        assert scope.in_step
        assert (scope.outcome, scope.reason) == (None, None)
        scope.info["seen"] = True

    Server().run(SessionMiddleware(BODIES["list body"](Program(early)), sqlite_registry), environ)

    (scope,) = scopes
    assert scope.info == {"seen": True}
    assert scope.environ is None
    assert not scope.in_step


def test_the_scopes_are_found_from_the_innermost(
    sqlite_registry: scoped_session[Session],
) -> None:
    """For extras that ask whether a scope of some kind is around them."""
    with session_scope(sqlite_registry) as outer, session_scope(sqlite_registry) as inner:
        assert list(scopes()) == [inner, outer]

    assert list(scopes()) == []


def test_a_step_that_never_began_ends_nothing(sqlite_registry: scoped_session[Session]) -> None:
    """An interruption came between the call and its first line."""
    with session_scope(sqlite_registry) as scope:
        Scope(None).leave()

        assert find_scope() is scope
