"""What type checkers make of the public names: checked by mypy and pyright, and never run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import create_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from typing_extensions import assert_type

from wsgi_dbsession import Scope, SessionMiddleware, current_scope, session_scope
from wsgi_dbsession.testing import Recorded, isolate, record_outcomes

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment


class MySession(Session):
    """A session class of the application's own."""


engine = create_engine("sqlite://")
registry = scoped_session(sessionmaker(engine), scopefunc=current_scope)
my_registry = scoped_session(sessionmaker(engine, class_=MySession), scopefunc=current_scope)


def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
    start_response("204 No Content", [])
    return []


def veto(environ: WSGIEnvironment, status: str, headers: list[tuple[str, str]]) -> bool:
    return status.startswith("5")


def skip(environ: WSGIEnvironment) -> bool:
    return bool(environ.get("PATH_INFO"))


def the_registry_keeps_its_type() -> None:
    assert_type(
        scoped_session(sessionmaker(engine), scopefunc=current_scope), scoped_session[Session]
    )
    assert_type(registry(), Session)
    assert_type(my_registry(), MySession)
    assert_type(current_scope(), Scope)


def the_middleware_is_an_application() -> None:
    plain: WSGIApplication = SessionMiddleware(app, registry)
    nested: WSGIApplication = SessionMiddleware(plain, registry, my_registry)
    full: WSGIApplication = SessionMiddleware(
        nested,
        registry,
        commit_on="headers",
        commit_veto=veto,
        commit_error=app,
        skip=skip,
    )
    SessionMiddleware(full, registry, commit_veto=None)


def a_block_has_a_scope() -> None:
    with session_scope(registry, my_registry) as scope:
        assert_type(scope, Scope)
        scope.on_commit(lambda: None)
        scope.on_rollback(lambda: None)
        scope.keep()
        scope.doom()
        with scope.released() as nothing:
            assert_type(nothing, None)


@session_scope(registry)
def job(number: int, *, name: str = "") -> list[str]:
    return [name] * number


def a_decorated_function_keeps_its_signature() -> None:
    assert_type(job(1, name="x"), list[str])
    job("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    job(1, nome="x")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def a_test_sees_outcomes() -> None:
    with isolate(registry, my_registry, wait=1) as outcomes:
        assert_type(outcomes, list[Recorded])
    with record_outcomes(registry) as outcomes:
        assert_type(outcomes[-1].scope, Scope | None)


def wrong_arguments_are_found() -> None:
    SessionMiddleware(app, sessionmaker(engine))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    SessionMiddleware(app, registry, commit_on="never")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
