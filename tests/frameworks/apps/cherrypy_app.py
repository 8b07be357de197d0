"""The application in CherryPy: a tree of exposed methods, used as a WSGI application."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import cherrypy
from cherrypy.lib.static import serve_download

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
    from collections.abc import Iterator


def answer_errors() -> None:
    """Answer the application's own errors, and leave the others to CherryPy."""
    match sys.exc_info()[1]:
        case RefusedError():
            cherrypy.response.status = 409
            cherrypy.response.body = b"refused"
        case ApologyError():
            cherrypy.response.body = b"we are sorry"
        case _:
            cherrypy.HTTPError(500).set_response()


class Notes:
    exposed = True

    @cherrypy.tools.response_headers(headers=[("Content-Type", "text/plain")])
    def GET(self) -> str:  # noqa: N802 - CherryPy's MethodDispatcher asks for the name
        return all_notes()

    def POST(self, text: str) -> None:  # noqa: N802 - likewise
        Session.add(Note(text=text))
        raise cherrypy.HTTPRedirect("/notes")


@cherrypy.tools.allow(methods=["POST"])
class Root:
    @cherrypy.expose
    def books(self) -> None:
        add_orphan()
        raise cherrypy.HTTPRedirect("/notes")

    @cherrypy.expose(["raise"])
    def fail(self) -> None:
        Session.add(Note(text="raise"))
        raise RuntimeError("not handled")

    @cherrypy.expose
    def refuse(self) -> None:
        Session.add(Note(text="refuse"))
        raise RefusedError

    @cherrypy.expose
    def apologise(self) -> None:
        Session.add(Note(text="apologise"))
        raise ApologyError

    @cherrypy.expose
    def abort(self) -> None:
        Session.add(Note(text="abort"))
        raise cherrypy.HTTPError(403)

    @cherrypy.expose
    @cherrypy.config(**{"response.stream": True})
    @cherrypy.tools.response_headers(headers=[("Content-Type", "text/plain")])
    def stream(self, ending: str) -> Iterator[bytes]:
        for line in stream(ending):
            yield line.encode()

    @cherrypy.expose
    def download(self, ending: str) -> Any:
        Session.add(Note(text="download"))
        if ending == "book":
            add_orphan()
        return serve_download(str(REPORT.absolute()))


def make_app(**options: Any) -> SessionMiddleware:
    tree = cherrypy._cptree.Tree()
    tree.mount(Root(), "", {"/": {"request.error_response": answer_errors}})
    tree.mount(
        Notes(), "/notes", {"/": {"request.dispatch": cherrypy.dispatch.MethodDispatcher()}}
    )
    tree.graft(mounted, "/mounted")
    return SessionMiddleware(tree, Session, **options)


cherrypy.config.update({"environment": "embedded"})
