"""What is special about Bottle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import bottle
import pytest

from tests.frameworks.apps.database import Session, add_orphan
from tests.frameworks.server import Client
from tests.support.models import Note
from wsgi_dbsession import SessionMiddleware

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.models import Database


@pytest.mark.parametrize(
    ("catchall", "by_server"),
    [
        pytest.param(True, False, id="Bottle answers 500"),
        pytest.param(False, True, id="catchall off: raised into the server"),
    ],
)
def test_an_exception_rolls_back_with_and_without_catchall(
    catchall: bool, by_server: bool, shop: Database
) -> None:
    """Whether Bottle or the server answers 500, nothing is committed."""
    app = bottle.Bottle()
    app.config["catchall"] = catchall

    @app.post("/")
    def fail() -> None:
        Session.add(Note(text="lost"))
        raise RuntimeError("not handled")

    answer = Client(SessionMiddleware(app, Session)).send("POST", "/")

    assert (answer.code, answer.by_server) == (500, by_server)
    assert shop.notes() == []


@pytest.mark.parametrize(
    ("status", "notes"),
    [
        pytest.param(201, ["raised"], id="a success is committed"),
        pytest.param(422, [], id="a refusal is rolled back"),
    ],
)
def test_a_raised_response_counts_by_its_status(
    status: int, notes: list[str], shop: Database
) -> None:
    """A raised HTTPResponse is no error, Bottle's users answer that way."""
    app = bottle.Bottle()

    @app.post("/")
    def add() -> None:
        Session.add(Note(text="raised"))
        raise bottle.HTTPResponse("raised", status=status)

    assert Client(SessionMiddleware(app, Session)).send("POST", "/").code == status
    assert shop.notes() == notes


def test_an_error_page_of_ones_own_is_part_of_the_rolled_back_request(shop: Database) -> None:
    """What the page for status 500 writes is rolled back too."""
    app = bottle.Bottle()

    @app.post("/")
    def fail() -> None:
        raise RuntimeError("not handled")

    @app.error(500)
    def page(error: bottle.HTTPError) -> str:
        Session.add(Note(text="error page"))
        Session.flush()
        return f"sorry: {error.exception}"

    answer = Client(SessionMiddleware(app, Session)).send("POST", "/")

    assert answer.body == b"sorry: not handled"
    assert shop.notes() == []


def test_hooks_and_view_are_one_unit_of_work(shop: Database) -> None:
    """before_request, the view and after_request are committed together."""
    app = bottle.Bottle()
    app.add_hook("before_request", lambda: Session.add(Note(text="before")))
    app.add_hook("after_request", lambda: Session.add(Note(text="after")))

    @app.post("/<ending>")
    def view(ending: str) -> str:
        if ending == "book":
            add_orphan()
        return ending

    client = Client(SessionMiddleware(app, Session))

    assert client.send("POST", "/book").by_server
    assert shop.notes() == []
    assert client.send("POST", "/end").whole
    assert shop.notes() == ["after", "before"]


def test_bottle_closes_the_stream_of_a_head_request_before_the_outcome(shop: Database) -> None:
    """Bottle drops a body that is not sent: what the view wrote counts, not what was streamed."""
    app = bottle.Bottle()

    @app.route("/", method="HEAD")
    def view() -> Iterator[str]:
        Session.add(Note(text="view"))
        yield "never sent"
        Session.add(Note(text="never reached"))

    Client(SessionMiddleware(app, Session)).head("/")

    assert shop.notes() == ["view"]
