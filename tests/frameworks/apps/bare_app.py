"""The application as a bare WSGI callable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs
from wsgiref.util import FileWrapper, shift_path_info

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

    from _typeshed.wsgi import StartResponse, WSGIEnvironment

TEXT = ("Content-Type", "text/plain; charset=utf-8")


def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    try:
        return dispatch(environ, start_response)
    except RefusedError:
        return answer(start_response, "409 Conflict", "refused")
    except ApologyError:
        return answer(start_response, "200 OK", "we are sorry")


def dispatch(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    page = shift_path_info(environ)
    ending = environ["PATH_INFO"].strip("/")
    if page == "mounted":
        return mounted(environ, start_response)
    match environ["REQUEST_METHOD"], page:
        case "GET", "notes":
            return answer(start_response, "200 OK", all_notes())
        case "POST", "notes":
            form = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])).decode()
            Session.add(Note(text=parse_qs(form)["text"][0]))
            start_response("303 See Other", [("Location", "/notes"), TEXT])
            return []
        case "POST", "books":
            add_orphan()
            start_response("303 See Other", [("Location", "/notes"), TEXT])
            return []
        case "POST", "raise":
            Session.add(Note(text="raise"))
            raise RuntimeError("not handled")
        case "POST", "refuse":
            Session.add(Note(text="refuse"))
            raise RefusedError
        case "POST", "apologise":
            Session.add(Note(text="apologise"))
            raise ApologyError
        case "POST", "abort":
            Session.add(Note(text="abort"))
            return answer(start_response, "403 Forbidden", "no")
        case "POST", "stream":
            start_response("200 OK", [TEXT])
            return (line.encode() for line in stream(ending))
        case "POST", "download":
            Session.add(Note(text="download"))
            if ending == "book":
                add_orphan()
            size = ("Content-Length", str(REPORT.stat().st_size))
            start_response("200 OK", [TEXT, size])
            file_wrapper = environ.get("wsgi.file_wrapper", FileWrapper)
            return file_wrapper(REPORT.open("rb"))  # type: ignore[no-any-return]
    return answer(start_response, "404 Not Found", "no such page")


def answer(start_response: StartResponse, status: str, text: str) -> Iterable[bytes]:
    body = text.encode()
    start_response(status, [TEXT, ("Content-Length", str(len(body)))])
    return [body]


def make_app(**options: Any) -> SessionMiddleware:
    return SessionMiddleware(app, Session, **options)
