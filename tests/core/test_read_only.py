"""What a scope says about reading, and what becomes of a write that was refused."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import PendingRollbackError
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from tests.support.postgres import DRIVERS
from tests.support.wsgi import ask, make_registry
from wsgi_dbsession import SessionMiddleware, current_scope, session_scope
from wsgi_dbsession._driver import READ_ONLY
from wsgi_dbsession._spoiled import spoil

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from _typeshed.wsgi import StartResponse, WSGIEnvironment

    from tests.support.models import Database


class RoutedSession(Session):
    dbsession_routed = True


@pytest.fixture
def registry(tmp_path: Path) -> scoped_session[Session]:
    """Sessions at AUTOCOMMIT, as on an engine that only reads."""
    engine = create_engine(
        f"sqlite:///{tmp_path / 'test.db'}",
        isolation_level="AUTOCOMMIT",
        execution_options={READ_ONLY: True},
    )
    return make_registry(engine, class_=RoutedSession)


@pytest.mark.parametrize("read_only", [None, False, True])
def test_a_block_says_whether_it_only_reads(
    read_only: bool | None, registry: scoped_session[Session]
) -> None:
    """Those who route Sessions read it; it may be changed, and it is not inherited."""
    with session_scope(registry, read_only=read_only) as scope:
        assert scope.read_only is read_only
        with session_scope(registry) as inner:
            assert inner.read_only is None
        scope.read_only = True

    @session_scope(registry, read_only=read_only)
    def job() -> bool | None:
        return current_scope().read_only

    assert job() is read_only


def test_a_request_says_nothing_by_itself(registry: scoped_session[Session]) -> None:
    """Its method may mean something to those who route Sessions."""
    found: list[bool | None] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        found.append(current_scope().read_only)
        start_response("200 OK", [])
        return [b""]

    ask(SessionMiddleware(app, registry))

    assert found == [None]


def test_a_block_needs_sessions_that_are_routed() -> None:
    """Otherwise nothing would refuse its writes."""
    routed = make_registry(create_engine("sqlite://"), class_=RoutedSession)
    plain = scoped_session(sessionmaker(), scopefunc=current_scope)

    with pytest.raises(ValueError, match="read_only must be False for Session, got True"):
        session_scope(routed, plain, read_only=True)
    session_scope(routed, plain, read_only=False)


def test_a_refused_write_keeps_the_scope_from_committing(
    registry: scoped_session[Session], caplog: pytest.LogCaptureFixture
) -> None:
    """The log does not say that anything was kept."""
    with (
        caplog.at_level(logging.ERROR, "wsgi_dbsession"),
        pytest.raises(PendingRollbackError, match="mine"),
        session_scope(registry),
    ):
        registry.execute(text("SELECT 1"))
        spoil(registry.connection(), ValueError("mine"))

    assert "commit failed, rolled back" in caplog.text


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_refused_write_on_postgresql_keeps_the_scope_from_committing(
    postgres_database: Database, driver: str
) -> None:
    """At AUTOCOMMIT nothing is aborted, so the driver's state does not show it."""
    engine = create_engine(
        postgres_database.url.set(drivername=f"postgresql+{driver}"),
        isolation_level="AUTOCOMMIT",
        execution_options={READ_ONLY: True},
    )
    routed = make_registry(engine, class_=RoutedSession)

    with pytest.raises(PendingRollbackError, match="mine"), session_scope(routed):
        routed.execute(text("SELECT 1"))
        spoil(routed.connection(), ValueError("mine"))

    engine.dispose()


def test_a_refused_write_cannot_be_discarded(registry: scoped_session[Session]) -> None:
    """Closing the Session would hide it; a rollback does not."""
    with pytest.raises(RuntimeError, match="a Session was closed"), session_scope(registry):
        registry.execute(text("SELECT 1"))
        spoil(registry.connection(), ValueError("mine"))
        registry.remove()

    with session_scope(registry):
        registry.execute(text("SELECT 1"))
        spoil(registry.connection(), ValueError("mine"))
        registry.rollback()
        registry.remove()


def test_a_connection_that_is_gone_has_nothing_to_lose(registry: scoped_session[Session]) -> None:
    """At AUTOCOMMIT, what it had written stays."""
    with session_scope(registry):
        registry.execute(text("SELECT 1"))
        registry.connection().invalidate()
        registry.remove()


def test_without_a_transaction_there_is_nothing_to_spoil() -> None:
    """An error may come before the first one, or after the last."""
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        spoil(connection, ValueError("mine"))
        connection.execute(text("SELECT 1"))
        connection.commit()
