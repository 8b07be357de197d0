"""What type checkers make of ``wsgi_dbsession.watch``: checked by mypy and pyright, not run."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from sqlalchemy import create_engine
from sqlalchemy.orm import scoped_session, sessionmaker
from typing_extensions import assert_type

from wsgi_dbsession import SessionMiddleware, current_scope, observe
from wsgi_dbsession.watch import (
    Board,
    Ended,
    Holder,
    Place,
    PoolUse,
    Waiter,
    Watch,
    allow_loopback,
)

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

Session = scoped_session(sessionmaker(create_engine("sqlite:///app.db")), scopefunc=current_scope)
watch = Watch(Session, warn_after=2)


def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
    start_response("204 No Content", [])
    return []


def is_operator(environ: WSGIEnvironment) -> bool:
    return allow_loopback(environ) or environ.get("REMOTE_USER") == "ann"


def a_watch_takes_registries_and_seconds() -> None:
    Watch(Session, Session, warn_after=None)
    Watch(app)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Watch(Session, warn_after="2")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def a_watch_is_an_observer() -> None:
    SessionMiddleware(app, Session, observers=[watch])
    observe(Session, watch)


def a_board_is_an_application() -> None:
    board = watch.board(app, "/_db", allow=is_operator)
    assert_type(board, Board)
    served: WSGIApplication = board
    watch.board(served)
    watch.board(app, allow=True)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


@watch.on_end
def keep(ended: Ended) -> float:
    assert_type(ended.attempt, int)
    assert_type(ended.wrote, bool | None)
    return ended.held_s


def what_a_watch_knows_has_types() -> None:
    assert_type(watch.holders(), list[Holder])
    assert_type(watch.waiting(), list[Waiter])
    assert_type(watch.ended(), list[Ended])
    assert_type(watch.places(), list[Place])
    assert_type(watch.pools(), list[PoolUse])
    assert_type(watch.holders()[0].since, datetime)
    assert_type(watch.holders()[0].backend_pid, int | None)
    assert_type(keep(watch.ended()[0]), float)
