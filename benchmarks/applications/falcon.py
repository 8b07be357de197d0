"""Falcon."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import falcon
import falcon_sqla

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
    from _typeshed.wsgi import WSGIApplication
    from sqlalchemy import Engine


class Resource:
    def __init__(self, operation: Operation | None, run: Run | None, body: Any) -> None:
        self._operation = operation
        self._run = run
        self._body = body

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        text = "hello"
        if self._operation is not None:
            if self._run is not None:
                text = self._run(self._operation)
            else:
                text = self._operation.call(request.context.session)
        if self._body is None:
            response.text = text
        elif callable(self._body):
            response.stream = self._body(text)
        else:
            response.data = self._body


def falcon_application(
    run: Run | None, middleware: Any = None, *, database: bool = True
) -> WSGIApplication:
    app: Any = falcon.App(middleware=middleware)
    app.add_route("/", Resource(None, None, None))
    app.add_route("/stream", Resource(None, None, blocks))
    if database:
        for path, operation in DATABASE_ROUTES.items():
            app.add_route(path, Resource(operation, run, None))
        app.add_route("/big", Resource(SELECT, run, BIG))
        app.add_route("/big-stream", Resource(SELECT, run, endless))
    application: WSGIApplication = app
    return application


def falcon_none(engine: Engine) -> WSGIApplication:
    return falcon_application(None, database=False)


def falcon_by_hand(engine: Engine) -> WSGIApplication:
    return falcon_application(by_hand(engine))


def falcon_sqla_0(engine: Engine) -> WSGIApplication:
    return falcon_application(None, [falcon_sqla.Manager(engine).middleware])


def falcon_ours(engine: Engine) -> WSGIApplication:
    registry = our_registry(engine)
    return SessionMiddleware(falcon_application(plain(registry)), registry)
