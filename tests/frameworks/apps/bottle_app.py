"""The application in Bottle: routes on a Bottle object, and a plugin for its own errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bottle import Bottle, HTTPError, HTTPResponse, abort, redirect, request, response, static_file

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
    from collections.abc import Callable, Iterator

pages = Bottle()


@pages.get("/notes")
def show_notes() -> str:
    response.content_type = "text/plain"
    return all_notes()


@pages.post("/notes")
def add_note() -> None:
    Session.add(Note(text=request.forms.text))
    redirect("/notes")


@pages.post("/books")
def add_book() -> None:
    add_orphan()
    redirect("/notes")


@pages.post("/raise")
def fail() -> None:
    Session.add(Note(text="raise"))
    raise RuntimeError("not handled")


@pages.post("/refuse")
def refuse() -> None:
    Session.add(Note(text="refuse"))
    raise RefusedError


@pages.post("/apologise")
def apologise() -> None:
    Session.add(Note(text="apologise"))
    raise ApologyError


@pages.post("/abort")
def forbid() -> None:
    Session.add(Note(text="abort"))
    abort(403)


@pages.post("/stream/<ending>")
def stream_notes(ending: str) -> Iterator[str]:
    response.content_type = "text/plain"
    yield from stream(ending)


@pages.post("/download/<ending>")
def download(ending: str) -> HTTPResponse:
    Session.add(Note(text="download"))
    if ending == "book":
        add_orphan()
    return static_file(REPORT.name, root=REPORT.parent, download=True)


def answer_errors(callback: Callable[..., Any]) -> Callable[..., Any]:
    """Answer the application's own errors: a plugin, Bottle has no handlers for classes."""

    def answer(*args: Any, **kwargs: Any) -> Any:
        try:
            return callback(*args, **kwargs)
        except RefusedError:
            return HTTPError(409, "refused")
        except ApologyError:
            return "we are sorry"

    return answer


pages.install(answer_errors)
pages.mount("/mounted/", mounted)


def make_app(**options: Any) -> SessionMiddleware:
    return SessionMiddleware(pages, Session, **options)
