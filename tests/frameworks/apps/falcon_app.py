"""The application in Falcon: resource classes and error handlers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import falcon
from werkzeug.middleware.dispatcher import DispatcherMiddleware

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
    from falcon import Request, Response


class Notes:
    def on_get(self, req: Request, resp: Response) -> None:
        resp.content_type = falcon.MEDIA_TEXT
        resp.text = all_notes()

    def on_post(self, req: Request, resp: Response) -> None:
        Session.add(Note(text=req.get_media()["text"]))
        raise falcon.HTTPSeeOther("/notes")


class Books:
    def on_post(self, req: Request, resp: Response) -> None:
        add_orphan()
        raise falcon.HTTPSeeOther("/notes")


class Errors:
    def on_post(self, req: Request, resp: Response) -> None:
        Session.add(Note(text="raise"))
        raise RuntimeError("not handled")

    def on_post_refuse(self, req: Request, resp: Response) -> None:
        Session.add(Note(text="refuse"))
        raise RefusedError

    def on_post_apologise(self, req: Request, resp: Response) -> None:
        Session.add(Note(text="apologise"))
        raise ApologyError

    def on_post_abort(self, req: Request, resp: Response) -> None:
        Session.add(Note(text="abort"))
        raise falcon.HTTPForbidden


class Stream:
    def on_post(self, req: Request, resp: Response, ending: str) -> None:
        resp.content_type = falcon.MEDIA_TEXT
        resp.stream = (line.encode() for line in stream(ending))


class Download:
    def on_post(self, req: Request, resp: Response, ending: str) -> None:
        Session.add(Note(text="download"))
        if ending == "book":
            add_orphan()
        resp.content_type = falcon.MEDIA_TEXT
        resp.downloadable_as = REPORT.name
        resp.set_stream(REPORT.open("rb"), REPORT.stat().st_size)


def answer_409(req: Request, resp: Response, error: RefusedError, params: dict[str, Any]) -> None:
    resp.status = falcon.HTTP_CONFLICT
    resp.text = "refused"


def answer_200(req: Request, resp: Response, error: ApologyError, params: dict[str, Any]) -> None:
    resp.text = "we are sorry"


def make_app(**options: Any) -> SessionMiddleware:
    app = falcon.App()
    app.add_route("/notes", Notes())
    app.add_route("/books", Books())
    errors = Errors()
    app.add_route("/raise", errors)
    for name in ("refuse", "apologise", "abort"):
        app.add_route(f"/{name}", errors, suffix=name)
    app.add_route("/stream/{ending}", Stream())
    app.add_route("/download/{ending}", Download())
    app.add_error_handler(RefusedError, answer_409)
    app.add_error_handler(ApologyError, answer_200)
    # Falcon's types ask for a write callable that returns None, where WSGI allows any object.
    mounts = DispatcherMiddleware(app, {"/mounted": mounted})  # type: ignore[arg-type]
    return SessionMiddleware(mounts, Session, **options)
