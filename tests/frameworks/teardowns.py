"""Hand-written ends of a Session that were left in place, in each framework's hooks.

Each function makes an application that adds a note at ``/``, and calls ``Session.remove()`` in one
hook of its framework.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import bottle
import cherrypy
import falcon
import flask
from django.conf import settings
from django.core.signals import request_finished
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.urls import path
from pyramid.config import Configurator
from pyramid.response import Response as PyramidResponse
from werkzeug.wrappers import Request, Response
from werkzeug.wsgi import ClosingIterator

from tests.frameworks.apps.database import Session
from tests.support.models import Note

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import TypeAlias

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment


def add_note() -> str:
    """Do the work of every application here."""
    Session.add(Note(text="new"))
    Session.flush()
    return "saved"


def _flask() -> flask.Flask:
    app = flask.Flask("tests")
    app.add_url_rule("/", view_func=add_note)
    return app


def flask_teardown_appcontext() -> WSGIApplication:
    app = _flask()

    @app.teardown_appcontext
    def remove(error: BaseException | None) -> None:
        Session.remove()

    return app


def flask_teardown_request() -> WSGIApplication:
    app = _flask()

    @app.teardown_request
    def remove(error: BaseException | None) -> None:
        Session.remove()

    return app


def flask_stream_with_context() -> WSGIApplication:
    app = flask.Flask("tests")

    @app.get("/")
    def stream() -> flask.typing.ResponseReturnValue:
        def lines() -> Iterator[str]:
            yield add_note()

        return flask.Response(flask.stream_with_context(lines()))

    @app.teardown_appcontext
    def remove(error: BaseException | None) -> None:
        Session.remove()

    return app


def flask_call_on_close() -> WSGIApplication:
    app = _flask()

    @app.after_request
    def remove_on_close(response: flask.Response) -> flask.Response:
        response.call_on_close(Session.remove)
        return response

    return app


def bottle_after_request() -> WSGIApplication:
    pages = bottle.Bottle()
    pages.get("/", callback=add_note)
    pages.add_hook("after_request", Session.remove)
    app: WSGIApplication = pages
    return app


def bottle_plugin() -> WSGIApplication:
    def plugin(callback: Callable[..., Any]) -> Callable[..., Any]:
        def remove(*args: Any, **kwargs: Any) -> Any:
            try:
                return callback(*args, **kwargs)
            finally:
                Session.remove()

        return remove

    pages = bottle.Bottle()
    pages.install(plugin)
    pages.get("/", callback=add_note)
    app: WSGIApplication = pages
    return app


def falcon_process_response() -> WSGIApplication:
    class Page:
        def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
            resp.text = add_note()

    class Remove:
        def process_response(
            self, req: falcon.Request, resp: falcon.Response, resource: object, succeeded: bool
        ) -> None:
            Session.remove()

    app = falcon.App(middleware=[Remove()])
    app.add_route("/", Page())
    return app  # type: ignore[return-value]  # see falcon_app.py


def _pyramid(config: Configurator) -> WSGIApplication:
    config.add_route("page", "/")
    config.add_view(lambda request: PyramidResponse(add_note()), route_name="page")
    app: WSGIApplication = config.make_wsgi_app()
    return app


def remove_tween(handler: Callable[[Any], Any], registry: object) -> Callable[[Any], Any]:
    """Make a tween; Pyramid finds it by its dotted name."""

    def tween(request: Any) -> Any:
        try:
            return handler(request)
        finally:
            Session.remove()

    return tween


def pyramid_tween() -> WSGIApplication:
    config = Configurator()
    config.add_tween(f"{__name__}.remove_tween")
    return _pyramid(config)


def pyramid_finished_callback() -> WSGIApplication:
    def dbsession(request: Any) -> Any:
        request.add_finished_callback(lambda request: Session.remove())
        return Session()

    def page(request: Any) -> PyramidResponse:
        request.dbsession.add(Note(text="new"))
        return PyramidResponse("saved")

    config = Configurator()
    config.add_request_method(dbsession, reify=True)
    config.add_route("page", "/")
    config.add_view(page, route_name="page")
    app: WSGIApplication = config.make_wsgi_app()
    return app


def _cherrypy(point: str) -> WSGIApplication:
    class Root:
        @cherrypy.expose
        def index(self) -> str:
            return add_note()

    tools = cherrypy._cptools.Toolbox("session_tools")
    tools.remove = cherrypy.Tool(point, Session.remove)
    config = {"/": {"session_tools.remove.on": True}}
    app = cherrypy.Application(Root(), "", config)
    app.toolboxes = {**app.toolboxes, "session_tools": tools}
    wsgi: WSGIApplication = app
    return wsgi


def cherrypy_before_finalize() -> WSGIApplication:
    return _cherrypy("before_finalize")


def cherrypy_on_end_resource() -> WSGIApplication:
    return _cherrypy("on_end_resource")


def cherrypy_on_end_request() -> WSGIApplication:
    return _cherrypy("on_end_request")


class Remove:
    """A Django middleware; Django finds it by its dotted name."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        try:
            return self.get_response(request)
        finally:
            Session.remove()


urlpatterns = [path("", lambda request: HttpResponse(add_note()))]


def django_middleware() -> WSGIApplication:
    settings.ROOT_URLCONF = __name__
    settings.MIDDLEWARE = [f"{__name__}.Remove"]
    return get_wsgi_application()


def django_request_finished() -> WSGIApplication:
    settings.ROOT_URLCONF = __name__
    settings.MIDDLEWARE = []
    app = get_wsgi_application()

    def with_receiver(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        # Django's signals are global: the receiver may not outlive this request.
        def remove(**kwargs: Any) -> None:
            request_finished.disconnect(remove)
            Session.remove()

        request_finished.connect(remove, weak=False)
        return app(environ, start_response)

    return with_receiver


def werkzeug_closing_iterator() -> WSGIApplication:
    @Request.application
    def page(request: Request) -> Response:
        return Response(add_note())

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        return ClosingIterator(page(environ, start_response), Session.remove)

    return app


def bare_finally() -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            body = add_note().encode()
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [body]
        finally:
            Session.remove()

    return app


Teardown: TypeAlias = "Callable[[], WSGIApplication]"

TEARDOWNS: dict[str, dict[str, Teardown]] = {
    "Flask": {
        "`@app.teardown_appcontext`": flask_teardown_appcontext,
        "`@app.teardown_request`": flask_teardown_request,
        "`@app.teardown_appcontext`, response of `stream_with_context`": flask_stream_with_context,
        "`response.call_on_close()`": flask_call_on_close,
    },
    "Bottle": {
        '`@app.hook("after_request")`': bottle_after_request,
        "a plugin with `try`/`finally`": bottle_plugin,
    },
    "Falcon": {
        "`process_response` of a middleware": falcon_process_response,
    },
    "Pyramid": {
        "a tween with `try`/`finally`": pyramid_tween,
        "`request.add_finished_callback()`": pyramid_finished_callback,
    },
    "CherryPy": {
        "a tool at `before_finalize`": cherrypy_before_finalize,
        "a tool at `on_end_resource`": cherrypy_on_end_resource,
        "a tool at `on_end_request`": cherrypy_on_end_request,
    },
    "Django": {
        "a middleware with `try`/`finally`": django_middleware,
        "a receiver of `request_finished`": django_request_finished,
    },
    "Werkzeug": {
        "`ClosingIterator(blocks, Session.remove)`": werkzeug_closing_iterator,
    },
    "bare WSGI": {
        "`try`/`finally` around the application": bare_finally,
    },
}
