"""Pyramid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyramid.config
import pyramid.response

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
    zope_registry,
)
from wsgi_dbsession import SessionMiddleware

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from _typeshed.wsgi import WSGIApplication
    from sqlalchemy import Engine


def pyramid_application(run: Run | None, *includes: str) -> WSGIApplication:
    config = pyramid.config.Configurator(settings={})
    for name in includes:
        config.include(name)

    def add(path: str, view: Callable[[Any], Any]) -> None:
        config.add_route(path, path)
        config.add_view(view, route_name=path)

    def respond(text: str) -> Any:
        return pyramid.response.Response(text, content_type="text/plain", charset="utf-8")

    def respond_with(iterable: Iterable[bytes]) -> Any:
        return pyramid.response.Response(app_iter=iterable, content_type="text/plain")

    add("/", lambda _: respond("hello"))
    add("/stream", lambda _: respond_with(blocks("hello")))
    if run is not None:

        def add_operation(path: str, operation: Operation) -> None:
            add(path, lambda _: respond(run(operation)))

        for path, operation in DATABASE_ROUTES.items():
            add_operation(path, operation)

        def big(_: Any) -> Any:
            run(SELECT)
            return pyramid.response.Response(body=BIG, content_type="text/plain")

        add("/big", big)
        add("/big-stream", lambda _: respond_with(endless(run(SELECT))))
    application: WSGIApplication = config.make_wsgi_app()
    return application


def pyramid_none(engine: Engine) -> WSGIApplication:
    return pyramid_application(None)


def pyramid_by_hand(engine: Engine) -> WSGIApplication:
    return pyramid_application(by_hand(engine))


def pyramid_tm_2(engine: Engine) -> WSGIApplication:
    return pyramid_application(plain(zope_registry(engine)), "pyramid_tm")


def pyramid_ours(engine: Engine) -> WSGIApplication:
    registry = our_registry(engine)
    return SessionMiddleware(pyramid_application(plain(registry)), registry)
