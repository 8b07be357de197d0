"""The application in Flask: an application factory and a blueprint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flask import Blueprint, Flask, abort, redirect, request, send_file, stream_with_context
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
    from collections.abc import Iterator

    from flask.typing import ResponseReturnValue

pages = Blueprint("pages", __name__)


@pages.get("/notes")
def show_notes() -> ResponseReturnValue:
    return all_notes(), {"Content-Type": "text/plain"}


@pages.post("/notes")
def add_note() -> ResponseReturnValue:
    Session.add(Note(text=request.form["text"]))
    return redirect("/notes", 303)


@pages.post("/books")
def add_book() -> ResponseReturnValue:
    add_orphan()
    return redirect("/notes", 303)


@pages.post("/raise")
def fail() -> ResponseReturnValue:
    Session.add(Note(text="raise"))
    raise RuntimeError("not handled")


@pages.post("/refuse")
def refuse() -> ResponseReturnValue:
    Session.add(Note(text="refuse"))
    raise RefusedError


@pages.post("/apologise")
def apologise() -> ResponseReturnValue:
    Session.add(Note(text="apologise"))
    raise ApologyError


@pages.post("/abort")
def forbid() -> ResponseReturnValue:
    Session.add(Note(text="abort"))
    abort(403)


@pages.post("/stream/<ending>")
def stream_notes(ending: str) -> ResponseReturnValue:
    def lines() -> Iterator[str]:
        for line in stream(ending):
            yield f"{request.method} {line}"

    return stream_with_context(lines()), {"Content-Type": "text/plain"}


@pages.post("/download/<ending>")
def download(ending: str) -> ResponseReturnValue:
    Session.add(Note(text="download"))
    if ending == "book":
        add_orphan()
    return send_file(REPORT, as_attachment=True)


@pages.app_errorhandler(RefusedError)
def answer_409(error: RefusedError) -> ResponseReturnValue:
    return "refused", 409


@pages.app_errorhandler(ApologyError)
def answer_200(error: ApologyError) -> ResponseReturnValue:
    return "we are sorry"


def make_app(**options: Any) -> Flask:
    app = Flask(__name__)
    app.register_blueprint(pages)
    app.wsgi_app = DispatcherMiddleware(  # type: ignore[method-assign]
        app.wsgi_app, {"/mounted": mounted}
    )
    app.wsgi_app = SessionMiddleware(  # type: ignore[method-assign]
        app.wsgi_app, Session, **options
    )
    return app
