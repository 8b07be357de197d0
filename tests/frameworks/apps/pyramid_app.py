"""The application in Pyramid: view configuration that a Configurator scans."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from pyramid.config import Configurator
from pyramid.httpexceptions import HTTPForbidden, HTTPSeeOther
from pyramid.response import FileResponse, Response
from pyramid.view import exception_view_config, view_config
from pyramid.wsgi import wsgiapp2

from tests.frameworks.apps.database import (
    REPORT,
    ApologyError,
    RefusedError,
    Session,
    add_orphan,
    all_notes,
    stream,
)
from tests.frameworks.apps.mounted import mounted
from tests.support.models import Note
from wsgi_dbsession import SessionMiddleware

if TYPE_CHECKING:
    from pyramid.request import Request


@view_config(route_name="notes", request_method="GET", renderer="string")
def show_notes(request: Request) -> str:
    return all_notes()


@view_config(route_name="notes", request_method="POST")
def add_note(request: Request) -> HTTPSeeOther:
    Session.add(Note(text=request.POST["text"]))
    return HTTPSeeOther(request.route_path("notes"))


@view_config(route_name="books", request_method="POST")
def add_book(request: Request) -> HTTPSeeOther:
    add_orphan()
    return HTTPSeeOther(request.route_path("notes"))


@view_config(route_name="raise", request_method="POST")
def fail(request: Request) -> None:
    Session.add(Note(text="raise"))
    raise RuntimeError("not handled")


@view_config(route_name="refuse", request_method="POST")
def refuse(request: Request) -> None:
    Session.add(Note(text="refuse"))
    raise RefusedError


@view_config(route_name="apologise", request_method="POST")
def apologise(request: Request) -> None:
    Session.add(Note(text="apologise"))
    raise ApologyError


@view_config(route_name="abort", request_method="POST")
def forbid(request: Request) -> None:
    Session.add(Note(text="abort"))
    raise HTTPForbidden


@view_config(route_name="stream", request_method="POST")
def stream_notes(request: Request) -> Response:
    lines = (line.encode() for line in stream(request.matchdict["ending"]))
    return Response(app_iter=lines, content_type="text/plain")


@view_config(route_name="download", request_method="POST")
def download(request: Request) -> Response:
    Session.add(Note(text="download"))
    if request.matchdict["ending"] == "book":
        add_orphan()
    return FileResponse(REPORT, request=request)


@exception_view_config(RefusedError)
def answer_409(error: RefusedError, request: Request) -> Response:
    return Response("refused", status=409)


@exception_view_config(ApologyError)
def answer_200(error: ApologyError, request: Request) -> Response:
    return Response("we are sorry")


def make_app(**options: Any) -> SessionMiddleware:
    with Configurator() as config:
        for name in ("notes", "books", "raise", "refuse", "apologise", "abort"):
            config.add_route(name, f"/{name}")
        for name in ("stream", "download"):
            config.add_route(name, f"/{name}/{{ending}}")
        config.add_route("mounted", "/mounted/*subpath")
        config.add_view(wsgiapp2(mounted), route_name="mounted")
        config.scan(sys.modules[__name__])
        return SessionMiddleware(config.make_wsgi_app(), Session, **options)
