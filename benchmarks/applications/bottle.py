"""Bottle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import bottle
import bottle_sqlalchemy

from benchmarks.applications.common import (
    BIG,
    DATABASE_ROUTES,
    SELECT,
    Operation,
    Run,
    blocks,
    by_hand,
    endless,
    our_registry,
    plain,
)
from wsgi_dbsession import SessionMiddleware

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from _typeshed.wsgi import WSGIApplication
    from sqlalchemy import Engine


def bottle_application(run: Run | None, plugin: Any = None) -> WSGIApplication:
    app: Any = bottle.Bottle()
    if plugin is not None:
        app.install(plugin)

    @app.get("/")
    def as_list() -> str:
        return "hello"

    @app.get("/stream")
    def stream() -> Iterable[bytes]:
        return blocks("hello")

    def add(path: str, operation: Operation, respond: Callable[[str], Any]) -> None:
        if plugin is not None:

            @app.get(path)
            def view_with_session(db: Any) -> Any:
                return respond(operation.call(db))

        elif run is not None:

            @app.get(path)
            def view() -> Any:
                return respond(run(operation))

    for path, operation in DATABASE_ROUTES.items():
        add(path, operation, str)
    add("/big", SELECT, lambda _: BIG)
    add("/big-stream", SELECT, endless)
    application: WSGIApplication = app
    return application


def bottle_none(engine: Engine) -> WSGIApplication:
    return bottle_application(None)


def bottle_by_hand(engine: Engine) -> WSGIApplication:
    return bottle_application(by_hand(engine))


def bottle_sqlalchemy_0(engine: Engine) -> WSGIApplication:
    return bottle_application(None, bottle_sqlalchemy.Plugin(engine))


def bottle_ours(engine: Engine) -> WSGIApplication:
    registry = our_registry(engine)
    return SessionMiddleware(bottle_application(plain(registry)), registry)
