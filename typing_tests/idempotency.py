"""What type checkers make of ``wsgi_dbsession.idempotency``: checked, and never run."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from sqlalchemy import MetaData, Table, create_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from typing_extensions import assert_type

from wsgi_dbsession import SessionMiddleware, current_scope
from wsgi_dbsession.idempotency import Idempotency, idempotency_table, purge
from wsgi_dbsession.retry import RetryMiddleware

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

registry = scoped_session(sessionmaker(create_engine("sqlite://")), scopefunc=current_scope)
keys = idempotency_table(MetaData(), name="request_key")


def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
    start_response("204 No Content", [])
    return []


def user_of(environ: WSGIEnvironment) -> str | None:
    return environ.get("REMOTE_USER")


def needs_key(environ: WSGIEnvironment) -> bool:
    return str(environ["PATH_INFO"]) == "/payments"


def the_table_is_a_table() -> None:
    assert_type(keys, Table)


def the_middleware_is_an_application() -> None:
    plain = Idempotency(app, registry, keys, principal=user_of)
    inner: WSGIApplication = plain
    RetryMiddleware(SessionMiddleware(inner, registry))
    Idempotency(
        app,
        registry,
        keys,
        principal=lambda environ: None,
        required=needs_key,
        wait=False,
        max_body=1,
        max_response=1,
        headers=["Location"],
    )


def a_purge_counts(session: Session) -> None:
    assert_type(purge(registry, keys, older_than=timedelta(days=1)), int)
    assert_type(purge(session, keys, older_than=timedelta(days=1)), int)


def wrong_arguments_are_found() -> None:
    Idempotency(app, registry, keys)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Idempotency(app, registry, "keys", principal=user_of)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    purge(registry, keys, older_than=3600)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
