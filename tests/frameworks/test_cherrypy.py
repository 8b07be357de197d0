"""What is special about CherryPy: its pipeline, its internal redirects, and its hooks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cherrypy
import pytest
from sqlalchemy import text

from tests.frameworks.apps.database import Session, add_orphan
from tests.frameworks.server import Client
from tests.support.models import Note
from wsgi_dbsession import SessionMiddleware, current_scope

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed.wsgi import WSGIApplication

    from tests.support.models import Database


class Root:
    @cherrypy.expose
    def raises(self) -> None:
        Session.add(Note(text="lost"))
        raise RuntimeError("not handled")

    @cherrypy.expose
    def books(self) -> str:
        Session.add(Note(text="lost"))
        add_orphan()
        return "added"

    @cherrypy.expose
    def passes_on(self) -> None:
        Session.add(Note(text="before the internal redirect"))
        raise cherrypy.InternalRedirect("/target")

    @cherrypy.expose
    def target(self) -> str:
        Session.add(Note(text="target"))
        return "target"


def around() -> WSGIApplication:
    return SessionMiddleware(cherrypy.Application(Root(), ""), Session)


def in_pipeline() -> WSGIApplication:
    pipeline = [("session", lambda app: SessionMiddleware(app, Session))]
    app: WSGIApplication = cherrypy.Application(Root(), "", {"/": {"wsgi.pipeline": pipeline}})
    return app


def test_throw_errors_lets_the_exception_through(shop: Database) -> None:
    """With request.throw_errors CherryPy's trapper still answers 500, and all is rolled back."""
    app = cherrypy.Application(Root(), "", {"/": {"request.throw_errors": True}})

    answer = Client(SessionMiddleware(app, Session)).send("GET", "/raises")

    assert answer.code == 500
    assert shop.notes() == []


@pytest.mark.parametrize(
    ("make_app", "by_server"),
    [
        pytest.param(around, True, id="around CherryPy: raised into the server"),
        pytest.param(in_pipeline, False, id="in the pipeline: CherryPy answers"),
    ],
)
def test_in_the_pipeline_cherrypy_answers_for_a_failed_commit(
    make_app: Callable[[], WSGIApplication], by_server: bool, shop: Database
) -> None:
    """The pipeline begins with CherryPy's error trapper, which then is outside."""
    answer = Client(make_app()).send("GET", "/books")

    assert (answer.code, answer.by_server) == (500, by_server)
    assert shop.notes() == []


@pytest.mark.parametrize(
    ("make_app", "notes"),
    [
        pytest.param(
            around,
            ["before the internal redirect", "target"],
            id="around CherryPy: one unit of work",
        ),
        pytest.param(in_pipeline, ["target"], id="in the pipeline: an error, and a new request"),
    ],
)
def test_in_the_pipeline_an_internal_redirect_rolls_back(
    make_app: Callable[[], WSGIApplication], notes: list[str], shop: Database
) -> None:
    """An InternalRedirect is an exception that CherryPy handles inside or outside of us."""
    answer = Client(make_app()).send("GET", "/passes_on")

    assert answer.body == b"target"
    assert shop.notes() == notes


def test_hooks_up_to_on_end_resource_come_before_the_outcome(shop: Database) -> None:
    """on_end_request is the only hook after it."""
    outcomes: dict[str, str | None] = {}
    points = ("before_handler", "before_finalize", "on_end_resource", "on_end_request")

    class Page:
        @cherrypy.expose
        def index(self) -> str:
            Session.execute(text("SELECT 1"))
            for point in points:

                def note(point: str = point) -> None:
                    outcomes[point] = current_scope().outcome

                cherrypy.request.hooks.attach(point, note)
            return "page"

    app: Any = cherrypy.Application(Page(), "")

    assert Client(SessionMiddleware(app, Session)).send("GET", "/").whole
    assert outcomes == {
        "before_finalize": None,
        "on_end_resource": None,
        "on_end_request": "commit",
    }
