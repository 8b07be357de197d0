"""What is special about Flask."""

from __future__ import annotations

import asyncio
import sys
from contextlib import nullcontext
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

import flask
import pytest
from flask import Flask, Response, request, stream_with_context
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, scoped_session, sessionmaker
from webtest import TestRequest

from tests.frameworks.apps.database import REPORT, Session, add_orphan, stream
from tests.frameworks.server import Client
from tests.support.models import Note
from wsgi_dbsession import NoScopeError, SessionMiddleware, current_scope, session_scope

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from flask.typing import ResponseReturnValue

    from tests.support.models import Database


@pytest.fixture
def app() -> Flask:
    """An empty application in the middleware."""
    app = Flask(__name__)
    app.wsgi_app = SessionMiddleware(app.wsgi_app, Session)  # type: ignore[method-assign]
    return app


def test_all_hooks_of_a_request_are_one_unit_of_work(app: Flask, shop: Database) -> None:
    """What before_request, view, after_request and teardown write is committed together."""

    @app.before_request
    def before() -> None:
        Session.add(Note(text="before"))

    @app.post("/<ending>")
    def view(ending: str) -> str:
        Session.add(Note(text="view"))
        if ending == "book":
            add_orphan()
        return ending

    @app.after_request
    def after(response: Response) -> Response:
        Session.add(Note(text="after"))
        return response

    @app.teardown_request
    def teardown(error: BaseException | None) -> None:
        Session.add(Note(text="teardown"))

    client = Client(app)

    assert client.send("POST", "/book").by_server
    assert shop.notes() == []
    assert client.send("POST", "/end").whole
    assert shop.notes() == ["after", "before", "teardown", "view"]


def test_an_abort_in_before_request_rolls_back(app: Flask, shop: Database) -> None:
    """The view is not asked, and what was written before the abort is gone."""

    @app.before_request
    def authenticate() -> None:
        Session.add(Note(text="who are you?"))
        flask.abort(401)

    @app.get("/")
    def page() -> str:
        raise AssertionError("must not be reached")

    assert Client(app).send("GET", "/").code == 401
    assert shop.notes() == []


@pytest.mark.usefixtures("shop")
def test_teardowns_come_before_the_outcome_and_call_on_close_after_it(app: Flask) -> None:
    """So a Session.remove() in a teardown discards what the commit would keep, and is refused."""
    outcomes: dict[str, str | None] = {}

    def note(hook: str) -> None:
        outcomes[hook] = current_scope().outcome

    @app.get("/")
    def page() -> Response:
        Session.execute(text("SELECT 1"))
        response = Response("page")
        response.call_on_close(lambda: note("call_on_close"))
        return response

    app.teardown_request(lambda error: note("teardown_request"))
    app.teardown_appcontext(lambda error: note("teardown_appcontext"))

    Client(app).get("/")

    assert outcomes == {
        "teardown_request": None,
        "teardown_appcontext": None,
        "call_on_close": "commit",
    }


@pytest.mark.parametrize(
    "setting",
    [
        pytest.param({"TESTING": True}, id="testing"),
        pytest.param({"DEBUG": True}, id="debug"),
        pytest.param({"PROPAGATE_EXCEPTIONS": True}, id="propagate"),
    ],
)
def test_a_propagated_exception_rolls_back(
    app: Flask, setting: dict[str, bool], shop: Database
) -> None:
    """Where Flask lets an exception through, it reaches the server, and nothing is committed."""
    app.config.update(setting)

    @app.post("/")
    def fail() -> str:
        Session.add(Note(text="lost"))
        raise RuntimeError("let through")

    answer = Client(app).send("POST", "/")

    assert isinstance(answer.error, RuntimeError)
    assert shop.notes() == []


@pytest.mark.parametrize(
    ("flushes", "answered"),
    [
        pytest.param(True, "409 by Flask", id="a flush in the view"),
        pytest.param(False, "500 by the server", id="left to the commit"),
    ],
)
def test_an_error_handler_sees_what_the_view_flushes(
    app: Flask, flushes: bool, answered: str, shop: Database
) -> None:
    """Flask's error handlers see an IntegrityError of the view's flush, and none of the commit."""
    with session_scope(Session):
        Session.add(Note(id=1, text="taken"))

    @app.post("/")
    def add() -> str:
        Session.add(Note(id=1, text="again"))
        if flushes:
            Session.flush()
        return "added"

    @app.errorhandler(IntegrityError)
    def conflict(error: IntegrityError) -> ResponseReturnValue:
        return "taken", 409

    answer = Client(app).send("POST", "/")

    assert f"{answer.code} by {'the server' if answer.by_server else 'Flask'}" == answered
    assert shop.notes() == ["taken"]


def test_flasks_own_error_page_can_answer_for_a_failed_commit(shop: Database) -> None:
    """Flask's handlers run as commit_error, for the error of the commit."""
    app = Flask(__name__)
    without = app.wsgi_app

    def commit_error(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        error = sys.exc_info()[1]
        assert isinstance(error, Exception)
        with app.request_context(environ):
            response = app.make_response(app.handle_user_exception(error))
            return response(environ, start_response)

    app.wsgi_app = SessionMiddleware(  # type: ignore[method-assign]
        without, Session, commit_error=commit_error
    )

    @app.post("/books")
    def add_book() -> str:
        add_orphan()
        return "added"

    @app.errorhandler(IntegrityError)
    def conflict(error: IntegrityError) -> ResponseReturnValue:
        return f"{request.path}: no such author", 409

    answer = Client(app).send("POST", "/books")

    assert (answer.code, answer.body) == (409, b"/books: no such author")


def test_an_async_view_has_the_scope_of_its_request(app: Flask, shop: Database) -> None:
    """Flask runs it in another thread with a copy of the context; it is the same unit of work."""

    @app.before_request
    def before() -> None:
        Session.add(Note(text="before"))

    @app.post("/<ending>")
    async def view(ending: str) -> str:
        await asyncio.sleep(0)
        Session.add(Note(text="async"))
        if ending == "raise":
            raise RuntimeError("in the async view")
        return ending

    client = Client(app)

    assert client.send("POST", "/raise").code == 500
    assert shop.notes() == []
    assert client.send("POST", "/end").whole
    assert shop.notes() == ["async", "before"]


def test_a_stream_needs_no_context_of_flask_for_its_session(app: Flask, shop: Database) -> None:
    """Without stream_with_context a stream has no request object, but it has its Session."""

    @app.post("/")
    def page() -> Response:
        return Response(stream("end"))

    assert Client(app).send("POST", "/").whole
    assert shop.notes() == ["one", "two"]


def test_stream_with_context_cannot_be_interleaved_in_one_context(
    app: Flask, postgres_shop: Database
) -> None:
    """Flask leaves its context set between blocks, finds the wrong one, and all is rolled back."""

    @app.post("/")
    def page() -> Response:
        return Response(stream_with_context(stream("end")))

    def respond() -> Any:
        return app(TestRequest.blank("/", POST={}).environ, lambda *start: lambda block: None)

    def interleave() -> None:
        first, second = respond(), respond()
        try:
            blocks = [next(first), next(second), next(first), next(second)]
            assert blocks == [b"one\n", b"one\n", b"two\n", b"two\n"]
            with pytest.raises(AssertionError, match="Popped wrong"):
                next(first)
        finally:
            first.close()
            with pytest.raises(LookupError):
                second.close()

    copy_context().run(interleave)

    assert postgres_shop.notes() == []


def test_not_modified_is_a_success(app: Flask, shop: Database) -> None:
    """A conditional send_file that answers 304 commits what the view wrote."""

    @app.get("/report")
    def report() -> Response:
        Session.add(Note(text="asked for"))
        return flask.send_file(REPORT)

    client = Client(app)
    etag = client.get("/report").headers["ETag"]

    response = client.get("/report", headers={"If-None-Match": etag})

    assert response.status_int == 304
    assert shop.notes() == ["asked for"] * 2


def test_after_a_request_of_the_test_client_there_is_no_scope(app: Flask, shop: Database) -> None:
    """In the client's with block Flask's context lives on, the request's Session does not."""

    @app.post("/")
    def add() -> str:
        Session.add(Note(text=request.form["text"]))
        return "added"

    with app.test_client() as client:
        client.post("/", data={"text": "first"})
        client.post("/", data={"text": "second"})

        assert request.form["text"] == "second"
        with pytest.raises(NoScopeError):
            Session.query(Note)
        with session_scope(Session):
            assert Session.query(Note).count() == 2


@pytest.mark.parametrize("in_a_with_block", [False, True])
def test_a_teardown_that_was_left_is_refused_in_tests_too(
    app: Flask, in_a_with_block: bool, shop: Database
) -> None:
    """In a with block Flask runs it again at the block's end, where there is nothing to remove."""

    @app.post("/")
    def add() -> str:
        Session.add(Note(text="refused"))
        return "added"

    @app.teardown_appcontext
    def remove(error: BaseException | None) -> None:
        Session.remove()

    client = app.test_client()
    refused = pytest.raises(RuntimeError, match=r"cannot commit: a Session was closed .+ remove")
    with client if in_a_with_block else nullcontext(), refused:
        client.post("/")

    assert shop.notes() == []


def test_a_command_opens_a_scope_of_its_own(app: Flask, shop: Database) -> None:
    """Flask's commands are no requests."""

    @app.cli.command("add")
    @session_scope(Session)
    def add() -> None:
        Session.add(Note(text="from the command"))

    result = app.test_cli_runner().invoke(args=["add"])

    assert result.exit_code == 0, result.output
    assert shop.notes() == ["from the command"]


class Model(DeclarativeBase):
    pass


def test_flask_sqlalchemys_models_work_with_a_registry_of_ones_own(tmp_path: Path) -> None:
    """Its models and its engine can stay; its db.session is refused, and has its own teardown."""
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{tmp_path / 'app.db'}"
    db = SQLAlchemy(app, model_class=Model)

    class Entry(db.Model):  # type: ignore[name-defined,misc]
        id: Mapped[int] = mapped_column(primary_key=True)

    with app.app_context():
        engine = db.engine
        db.create_all()
        with pytest.raises(ValueError, match="current_scope"):
            SessionMiddleware(app.wsgi_app, db.session)
    own = scoped_session(sessionmaker(engine), scopefunc=current_scope)
    app.wsgi_app = SessionMiddleware(app.wsgi_app, own)  # type: ignore[method-assign]

    @app.post("/")
    def add() -> str:
        own.add(Entry())
        return "added"

    Client(app).send("POST", "/")

    with session_scope(own):
        assert own.query(Entry).count() == 1
    engine.dispose()


def test_a_generator_that_is_dropped_by_flask_is_rolled_back(app: Flask, shop: Database) -> None:
    """The client leaves, Flask closes the generator, which may still use its Session."""
    seen: list[int] = []

    @app.post("/")
    def page() -> Response:
        def lines() -> Iterator[str]:
            try:
                yield from stream("end")
            finally:
                seen.append(Session.query(Note).count())

        return Response(stream_with_context(lines()))

    assert Client(app).send("POST", "/", blocks=1).left
    assert seen == [1]
    assert shop.notes() == []
