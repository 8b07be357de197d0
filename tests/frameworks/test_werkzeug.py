"""What is special about Werkzeug."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from werkzeug.debug import DebuggedApplication
from werkzeug.exceptions import Conflict
from werkzeug.test import Client as WerkzeugClient
from werkzeug.wrappers import Request, Response

from tests.frameworks.apps.database import REPORT, Session, add_orphan, stream
from tests.frameworks.server import Client
from tests.support.models import Note
from wsgi_dbsession import SessionMiddleware

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

    from tests.support.models import Database


@Request.application
def fail_in_commit(request: Request) -> Response:
    Session.add(Note(text="lost"))
    add_orphan()
    return Response("saved")


def test_an_http_exception_can_answer_for_a_failed_commit(shop: Database) -> None:
    """Werkzeug's exceptions are WSGI applications, so one of them will do as commit_error."""
    app = SessionMiddleware(fail_in_commit, Session, commit_error=Conflict("nothing was saved"))

    answer = Client(app).send("POST", "/")

    assert answer.code == 409
    assert b"nothing was saved" in answer.body
    assert shop.notes() == []


def test_a_debugger_outside_shows_the_failed_commit(shop: Database) -> None:
    """Outer middleware sees the error of the commit, as it sees those of the application."""
    app = DebuggedApplication(SessionMiddleware(fail_in_commit, Session), evalex=False)

    answer = Client(app).send("POST", "/")

    assert answer.code == 500
    assert b"IntegrityError" in answer.body
    assert shop.notes() == []


@pytest.mark.parametrize("outside", [True, False])
def test_a_debugger_that_swallows_an_error_of_a_stream_commits_nothing(
    outside: bool, shop: Database
) -> None:
    """It ends the body as if it were whole, and starts a response anew without exc_info."""

    @Request.application
    def page(request: Request) -> Response:
        return Response(stream("raise"))

    if outside:
        app: WSGIApplication = DebuggedApplication(SessionMiddleware(page, Session), evalex=False)
    else:
        app = SessionMiddleware(DebuggedApplication(page, evalex=False), Session)

    Client(app).send("POST", "/")

    assert shop.notes() == []


def test_a_part_of_a_file_is_a_success(shop: Database) -> None:
    """A range request, answered 206, commits what it wrote."""

    @Request.application
    def page(request: Request) -> Response:
        Session.add(Note(text="part"))
        size = REPORT.stat().st_size
        response = Response(REPORT.read_bytes())
        return response.make_conditional(request, accept_ranges=True, complete_length=size)

    response = Client(SessionMiddleware(page, Session)).get("/", headers={"Range": "bytes=4-12"})

    assert (response.status_int, response.body) == (206, b"quarterly")
    assert shop.notes() == ["part"]


def test_werkzeugs_test_client_sees_the_failed_commit(shop: Database) -> None:
    """The client of werkzeug.test raises what a server would get."""
    client = WerkzeugClient(SessionMiddleware(fail_in_commit, Session, commit_error=Conflict()))

    assert client.post("/").status_code == 409
    assert shop.notes() == []


def test_call_on_close_runs_after_the_outcome(shop: Database) -> None:
    """What it writes is a transaction of its own, and is committed too."""

    @Request.application
    def page(request: Request) -> Response:
        Session.add(Note(text="page"))
        response = Response("saved")

        def count() -> None:
            assert shop.notes() == ["page"]
            Session.add(Note(text="closed"))

        response.call_on_close(count)
        return response

    assert Client(SessionMiddleware(page, Session)).send("POST", "/").error is None
    assert shop.notes() == ["closed", "page"]
