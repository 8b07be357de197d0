"""What is special about Falcon."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import falcon
import falcon.testing
import pytest
from sqlalchemy.exc import IntegrityError

from tests.frameworks.apps.database import Session, add_orphan
from tests.frameworks.server import Client
from tests.support.models import Note
from wsgi_dbsession import SessionMiddleware

if TYPE_CHECKING:
    from falcon import Request, Response

    from tests.support.models import Database


class Page:
    def on_post(self, req: Request, resp: Response) -> None:
        Session.add(Note(text="page"))
        resp.text = "saved"


class FailingPage:
    def on_post(self, req: Request, resp: Response) -> None:
        Session.add(Note(text="lost"))
        add_orphan()


def wrap(page: object, *middleware: Any) -> SessionMiddleware:
    app = falcon.App(middleware=list(middleware))
    app.add_route("/", page)
    return SessionMiddleware(app, Session)  # type: ignore[arg-type]  # see falcon_app.py


def test_a_middleware_that_hands_out_the_session_works(shop: Database) -> None:
    """req.context.session, made when the request comes in, is the Session of the request."""

    class HandOut:
        def process_request(self, req: Request, resp: Response) -> None:
            req.context.session = Session()

    class ContextPage:
        def on_post(self, req: Request, resp: Response) -> None:
            req.context.session.add(Note(text="by the context"))
            assert req.context.session is Session()

    assert Client(wrap(ContextPage(), HandOut())).send("POST", "/").whole
    assert shop.notes() == ["by the context"]


def test_an_error_in_process_response_rolls_back(shop: Database) -> None:
    """Falcon makes a 500 of it, although the responder had succeeded."""

    class Fail:
        def process_response(
            self, req: Request, resp: Response, resource: object, req_succeeded: bool
        ) -> None:
            raise RuntimeError("after the responder")

    assert Client(wrap(Page(), Fail())).send("POST", "/").code == 500
    assert shop.notes() == []


def test_a_response_that_is_complete_before_the_responder_commits(shop: Database) -> None:
    """What a middleware wrote before it set resp.complete counts like the work of a responder."""

    class Cached:
        def process_request(self, req: Request, resp: Response) -> None:
            Session.add(Note(text="cache hit"))
            resp.text = "cached"
            resp.complete = True

    assert Client(wrap(Page(), Cached())).send("POST", "/").body == b"cached"
    assert shop.notes() == ["cache hit"]


def test_falcons_test_client_raises_the_failed_commit(shop: Database) -> None:
    """Falcon's own client, which validates by wsgiref.validate, sees what a server sees."""
    client = falcon.testing.TestClient(wrap(FailingPage()))

    with pytest.raises(IntegrityError):
        client.simulate_post("/")

    assert falcon.testing.TestClient(wrap(Page())).simulate_post("/").text == "saved"
    assert shop.notes() == ["page"]
