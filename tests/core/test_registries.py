"""Which registries are refused, and which Sessions are theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from tests.support.models import Note
from tests.support.wsgi import BODIES, Program, make_registry
from wsgi_dbsession import SessionMiddleware, current_scope, session_scope
from wsgi_dbsession._transaction import AdoptedSession

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.models import Database

pytestmark = pytest.mark.promise("constructors")


def session_class() -> scoped_session[Session]:
    return scoped_session(cast("Any", Session), scopefunc=current_scope)


def plain_function() -> scoped_session[Session]:
    return scoped_session(cast("Any", lambda: Session()), scopefunc=current_scope)


def thread_local() -> scoped_session[Session]:
    return scoped_session(sessionmaker())


def other_scopefunc() -> scoped_session[Session]:
    return scoped_session(sessionmaker(), scopefunc=lambda: 1)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        pytest.param(
            sessionmaker, TypeError, "must be a scoped_session, got", id="a sessionmaker"
        ),
        pytest.param(Session, TypeError, "must be a scoped_session, got", id="a Session"),
        pytest.param(
            lambda: create_engine("sqlite://"),
            TypeError,
            "must be a scoped_session",
            id="an Engine",
        ),
        pytest.param(thread_local, ValueError, "must be current_scope", id="a thread-local one"),
        pytest.param(other_scopefunc, ValueError, "must be current_scope", id="another scopefunc"),
        pytest.param(
            session_class, TypeError, "must be a sessionmaker", id="over a Session class"
        ),
        pytest.param(plain_function, TypeError, "must be a sessionmaker", id="over a function"),
    ],
)
@pytest.mark.parametrize("user", ["the middleware", "a block"])
def test_a_registry_that_cannot_work_is_refused(
    make: Callable[[], Any], kind: type[Exception], message: str, user: str
) -> None:
    """What is wrong is said where it is given, and how to make a registry."""
    given = make()

    with pytest.raises(kind, match=message) as caught:
        if user == "a block":
            session_scope(given)
        else:
            SessionMiddleware(BODIES["list body"](Program()), given)

    assert "scoped_session(sessionmaker(engine), scopefunc=current_scope)" in str(caught.value)


def test_a_block_needs_a_registry() -> None:
    """None at all is refused, with the fix."""
    with pytest.raises(ValueError, match=r"registries must not be empty\. .*scoped_session\("):
        session_scope()


def test_a_registry_is_counted_once(sqlite_registry: scoped_session[Session]) -> None:
    """Given twice, it takes part once."""
    with session_scope(sqlite_registry, sqlite_registry) as scope:
        session = sqlite_registry()
        assert list(scope.sessions.values()) == [session]


def test_a_session_without_autobegin_loses_nothing(sqlite_database: Database) -> None:
    """What was added to it without a transaction is not passed over: SQLAlchemy refuses it."""
    registry = make_registry(sqlite_database.engine, autobegin=False)

    with (
        pytest.raises(InvalidRequestError, match="Autobegin is disabled"),
        session_scope(registry),
    ):
        registry.add(Note(text="lost"))
    with session_scope(registry), registry.begin():
        registry.add(Note(text="kept"))

    assert sqlite_database.notes() == ["kept"]


def test_a_session_of_the_applications_own_making_is_committed(
    sqlite_database: Database, sqlite_registry: scoped_session[Session]
) -> None:
    """Even if the registry is never asked for it."""
    with session_scope(sqlite_registry):
        session = sqlite_registry.session_factory()
        session.add(Note(text="a"))
        sqlite_registry.registry.set(session)

    assert sqlite_database.notes() == ["a"]


def test_a_session_of_another_factory_is_refused(
    sqlite_database: Database, sqlite_registry: scoped_session[Session]
) -> None:
    """What it loses, it would not report."""
    with (
        Session(sqlite_database.engine) as session,
        pytest.raises(
            TypeError, match=r"a Session of its factory, got .*Session\.session_factory"
        ),
        session_scope(sqlite_registry),
    ):
        sqlite_registry.registry.set(session)


class Raced(sessionmaker[Session]):
    """Another thread adopts its registry after each but the last look at its class."""

    kinds: list[type[Session]]

    @property
    def class_(self) -> Any:
        return self.kinds.pop(0) if len(self.kinds) > 1 else self.kinds[0]

    @class_.setter
    def class_(self, kind: Any) -> None:
        self.kinds = [kind]


def test_another_thread_adopts_the_registry_meanwhile(sqlite_database: Database) -> None:
    """No Session class is derived from ``AdoptedSession`` twice."""
    factory = Raced(sqlite_database.engine)
    plain = factory.class_
    factory.kinds = [plain, type("Session", (AdoptedSession, plain), {"dbsession_lines": set()})]
    registry = scoped_session(factory, scopefunc=current_scope)

    with session_scope(registry):
        registry.add(Note(text="a"))

    assert sqlite_database.notes() == ["a"]


def test_a_session_that_outlives_its_scope_is_its_owners(
    sqlite_registry: scoped_session[Session], caplog: pytest.LogCaptureFixture
) -> None:
    """No warning names what it discards then."""
    with session_scope(sqlite_registry) as scope:
        session = sqlite_registry()
    session.begin_nested().rollback()
    session.execute(text("INSERT INTO note (text) VALUES ('a')"))
    session.close()

    assert not caplog.records
    assert not scope.undecided()
