"""The application in Werkzeug: a map of rules, and a class that dispatches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from werkzeug.exceptions import Forbidden, HTTPException
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.routing import Map, Rule
from werkzeug.utils import redirect, send_file
from werkzeug.wrappers import Request, Response

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
    from collections.abc import Iterable

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

URLS = Map(
    [
        Rule("/notes", methods=["GET"], endpoint="show_notes"),
        Rule("/notes", methods=["POST"], endpoint="add_note"),
        Rule("/books", methods=["POST"], endpoint="add_book"),
        Rule("/raise", methods=["POST"], endpoint="fail"),
        Rule("/refuse", methods=["POST"], endpoint="refuse"),
        Rule("/apologise", methods=["POST"], endpoint="apologise"),
        Rule("/abort", methods=["POST"], endpoint="forbid"),
        Rule("/stream/<ending>", methods=["POST"], endpoint="stream_notes"),
        Rule("/download/<ending>", methods=["POST"], endpoint="download"),
    ]
)


class Application:
    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        answer = self.dispatch(Request(environ))
        return answer(environ, start_response)

    def dispatch(self, request: Request) -> WSGIApplication:
        try:
            endpoint, values = URLS.bind_to_environ(request.environ).match()
            response: Response = getattr(self, f"on_{endpoint}")(request, **values)
        except HTTPException as error:
            return error
        except RefusedError:
            return Response("refused", status=409)
        except ApologyError:
            return Response("we are sorry")
        return response

    def on_show_notes(self, request: Request) -> Response:
        return Response(all_notes())

    def on_add_note(self, request: Request) -> Response:
        Session.add(Note(text=request.form["text"]))
        return redirect("/notes", 303)

    def on_add_book(self, request: Request) -> Response:
        add_orphan()
        return redirect("/notes", 303)

    def on_fail(self, request: Request) -> Response:
        Session.add(Note(text="raise"))
        raise RuntimeError("not handled")

    def on_refuse(self, request: Request) -> Response:
        Session.add(Note(text="refuse"))
        raise RefusedError

    def on_apologise(self, request: Request) -> Response:
        Session.add(Note(text="apologise"))
        raise ApologyError

    def on_forbid(self, request: Request) -> Response:
        Session.add(Note(text="abort"))
        raise Forbidden

    def on_stream_notes(self, request: Request, ending: str) -> Response:
        return Response(stream(ending), mimetype="text/plain")

    def on_download(self, request: Request, ending: str) -> Response:
        Session.add(Note(text="download"))
        if ending == "book":
            add_orphan()
        return send_file(REPORT, request.environ, as_attachment=True)


def make_app(**options: Any) -> SessionMiddleware:
    app = DispatcherMiddleware(Application(), {"/mounted": mounted})
    return SessionMiddleware(app, Session, **options)
