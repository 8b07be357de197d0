"""The application in Django, as WSGI and without Django's ORM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.core.exceptions import PermissionDenied
from django.core.wsgi import get_wsgi_application
from django.http import (
    FileResponse,
    HttpRequest,
    HttpResponse,
    HttpResponseBase,
    StreamingHttpResponse,
)
from django.shortcuts import redirect
from django.urls import path
from django.utils.functional import empty
from django.views.decorators.http import require_POST
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
    from collections.abc import Callable


def notes(request: HttpRequest) -> HttpResponse:
    if request.method == "POST":
        Session.add(Note(text=request.POST["text"]))
        return redirect("/notes")
    return HttpResponse(all_notes(), content_type="text/plain")


@require_POST
def add_book(request: HttpRequest) -> HttpResponse:
    add_orphan()
    return redirect("/notes")


@require_POST
def fail(request: HttpRequest) -> HttpResponse:
    Session.add(Note(text="raise"))
    raise RuntimeError("not handled")


@require_POST
def refuse(request: HttpRequest) -> HttpResponse:
    Session.add(Note(text="refuse"))
    raise RefusedError


@require_POST
def apologise(request: HttpRequest) -> HttpResponse:
    Session.add(Note(text="apologise"))
    raise ApologyError


@require_POST
def forbid(request: HttpRequest) -> HttpResponse:
    Session.add(Note(text="abort"))
    raise PermissionDenied


@require_POST
def stream_notes(request: HttpRequest, ending: str) -> StreamingHttpResponse:
    return StreamingHttpResponse(stream(ending), content_type="text/plain")


@require_POST
def download(request: HttpRequest, ending: str) -> FileResponse:
    Session.add(Note(text="download"))
    if ending == "book":
        add_orphan()
    return FileResponse(REPORT.open("rb"), as_attachment=True)


class AnswerErrors:
    """A Django middleware that answers the application's own errors."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        return self.get_response(request)

    def process_exception(self, request: HttpRequest, error: Exception) -> HttpResponse | None:
        match error:
            case RefusedError():
                return HttpResponse("refused", status=409)
            case ApologyError():
                return HttpResponse("we are sorry")
            case _:
                return None


urlpatterns = [
    path("notes", notes),
    path("books", add_book),
    path("raise", fail),
    path("refuse", refuse),
    path("apologise", apologise),
    path("abort", forbid),
    path("stream/<ending>", stream_notes),
    path("download/<ending>", download),
]


def configure() -> None:
    """Give Django the settings of this application; it has one set of settings in a process."""
    lazy: Any = settings
    lazy._wrapped = empty
    settings.configure(
        ALLOWED_HOSTS=["*"],
        MIDDLEWARE=[
            "django.middleware.common.CommonMiddleware",
            f"{__name__}.AnswerErrors",
        ],
        ROOT_URLCONF=__name__,
        SECRET_KEY="of the tests",
    )


def make_app(**options: Any) -> SessionMiddleware:
    app = DispatcherMiddleware(get_wsgi_application(), {"/mounted": mounted})
    return SessionMiddleware(app, Session, **options)
