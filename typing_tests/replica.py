"""What type checkers make of ``wsgi_dbsession.replica``: checked by mypy and pyright, not run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import Engine, create_engine, make_url
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from typing_extensions import assert_type

from wsgi_dbsession import SessionMiddleware, current_scope, session_scope
from wsgi_dbsession.replica import (
    Replicas,
    has_safe_method,
    is_refused_write,
    read_only_engine,
    session_class,
)

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

engine = create_engine("postgresql+psycopg://host/db")


def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
    start_response("204 No Content", [])
    return []


def searches(environ: WSGIEnvironment) -> bool:
    return has_safe_method(environ) or environ["PATH_INFO"] == "/search"


def an_engine_comes_of_an_engine_or_a_url() -> None:
    assert_type(read_only_engine(engine), Engine)
    assert_type(read_only_engine("sqlite:///app.db", pool_size=1), Engine)
    assert_type(read_only_engine(make_url("sqlite:///app.db")), Engine)
    read_only_engine(None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def a_class_is_one_of_sessions() -> None:
    reads = read_only_engine(engine)
    assert_type(session_class(engine, reads), type[Session])
    maker = sessionmaker(class_=session_class(engine, reads, when=searches))
    assert_type(scoped_session(maker, scopefunc=current_scope)(), Session)
    session_class(engine, reads, when="GET")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def replicas_wrap_an_application() -> None:
    replicas = Replicas(
        engine,
        [read_only_engine(engine)],
        secret=b"bytes or a str of sixteen",
        cookie="position",
        max_age=60,
        secure=True,
        when=searches,
        pause=1,
    )
    registry = scoped_session(sessionmaker(class_=replicas.Session), scopefunc=current_scope)
    assert_type(registry(), Session)
    wrapped: WSGIApplication = replicas.wrap(SessionMiddleware(app, registry))
    replicas.wrap(wrapped)
    Replicas(engine, [engine])  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def a_scope_says_what_it_does() -> None:
    with session_scope(scoped_session(sessionmaker()), read_only=True) as scope:
        assert_type(scope.read_only, bool | None)
        scope.read_only = False
    assert_type(is_refused_write(ValueError()), bool)
