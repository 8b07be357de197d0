"""Applications that lose races, in several shapes and frameworks."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import bottle
import falcon
import flask
from pyramid.config import Configurator
from pyramid.response import Response as PyramidResponse
from sqlalchemy import func, select

from tests.support.models import Note
from wsgi_dbsession import SessionMiddleware
from wsgi_dbsession.retry import Retry, RetryMiddleware

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from sqlalchemy.orm import Session, scoped_session

    from tests.support.postgres import Server


@dataclass
class Race:
    """Work that somebody else gets in the way of, in the first attempts."""

    registry: scoped_session[Session]
    server: Server
    #: the statement, or the COMMIT, that tells
    at: str = "statement"
    #: in how many attempts
    lost: int = 1
    attempts: int = 0

    def run(self) -> None:
        """Add a note that says how many there are, and count the attempt."""
        self.attempts += 1
        if self.at == "statement":
            note = self.registry.scalars(select(Note).order_by(Note.id)).first()
            assert note is not None
            if self.attempts <= self.lost:
                self.interfere("UPDATE note SET text = text || '!' WHERE id = 1")
            note.text += "?"
            self.registry.flush()
        else:
            count = self.registry.scalar(select(func.count()).select_from(Note))
            self.registry.add(Note(text=f"number {count}"))
            self.registry.flush()
            if self.attempts <= self.lost:
                self.interfere("INSERT INTO note (text) SELECT 'theirs ' || count(*) FROM note")

    def interfere(self, statement: Any) -> None:
        # Not by an engine: its commit would be one of this request.
        engine: Any = self.registry.get_bind()
        database: str = engine.url.database
        with self.server.connect(database) as connection:
            connection.execute("SET default_transaction_isolation = serializable")
            connection.execute(statement)

    def done(self) -> list[str]:
        """Return the notes as they must be after one success."""
        if self.at == "statement":
            return ["first" + "!" * self.lost + "?"]
        theirs = [f"theirs {number}" for number in range(1, self.lost + 1)]
        return sorted(["first", *theirs, f"number {self.lost + 1}"])


def protect(app: WSGIApplication, *registries: scoped_session[Session], **more: Any) -> Any:
    """Put both middlewares around an application, with no delay."""
    return RetryMiddleware(SessionMiddleware(app, *registries), **{"backoff": 0, **more})


class Closing:
    """A response with a ``close()`` that counts."""

    closed = 0

    def __init__(self, blocks: Iterable[bytes]) -> None:
        self.blocks = blocks

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.blocks)

    def close(self) -> None:
        Closing.closed += 1


TEXT = [("Content-Type", "text/plain")]
SIZED = [*TEXT, ("Content-Length", "4")]


def list_app(work: Callable[[], object]) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        work()
        start_response("200 OK", SIZED)
        return [b"done"]

    return app


def early_start_app(work: Callable[[], object]) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", SIZED)
        work()
        return (b"done",)

    return app


def file_app(work: Callable[[], object]) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        work()
        start_response("200 OK", SIZED)
        wrap: Callable[[io.BytesIO], Iterable[bytes]] = environ["wsgi.file_wrapper"]
        return wrap(io.BytesIO(b"done"))

    return app


def generator_app(work: Callable[[], object]) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        work()
        start_response("200 OK", SIZED)
        yield b"done"

    return app


def closing_app(work: Callable[[], object]) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        work()
        start_response("200 OK", SIZED)
        return Closing([b"done"])

    return app


def lazy_app(work: Callable[[], object]) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        def blocks() -> Iterator[bytes]:
            work()
            yield b"done"

        start_response("200 OK", SIZED)
        return Closing(blocks())

    return app


SHAPES = {
    "list": list_app,
    "start before the work": early_start_app,
    "file wrapper": file_app,
    "generator application": generator_app,
    "iterable with close()": closing_app,
    "work in the first next()": lazy_app,
}


def flask_app(work: Callable[[], object]) -> WSGIApplication:
    app = flask.Flask("retry")

    @app.post("/path")
    def view() -> str:
        work()
        return "done"

    return app


def bottle_app(work: Callable[[], object]) -> WSGIApplication:
    app = bottle.Bottle()

    def view() -> str:
        work()
        return "done"

    app.route("/path", "POST", view)
    wsgi: WSGIApplication = app
    return wsgi


def falcon_app(work: Callable[[], object]) -> WSGIApplication:
    class Resource:
        def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
            work()
            response.text = "done"

    app: Any = falcon.App()
    app.add_route("/path", Resource())
    wsgi: WSGIApplication = app
    return wsgi


def pyramid_app(work: Callable[[], object]) -> WSGIApplication:
    def view(request: Any) -> Any:
        work()
        return PyramidResponse("done")

    def error(failure: Any, request: Any) -> Any:
        return PyramidResponse("sorry", status=500)

    with Configurator() as config:
        config.add_route("path", "/path")
        config.add_view(view, route_name="path")
        config.add_exception_view(error)
        wsgi: WSGIApplication = config.make_wsgi_app()
    return wsgi


def bare_app(work: Callable[[], object]) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            work()
        except Exception:
            start_response("500 Internal Server Error", TEXT, sys.exc_info())
            return [b"sorry"]
        start_response("200 OK", TEXT)
        return [b"done"]

    return app


FRAMEWORKS = {
    "Flask": flask_app,
    "Bottle": bottle_app,
    "Falcon": falcon_app,
    "Pyramid": pyramid_app,
    "bare": bare_app,
}


class Restless:
    """An application whose request fails with an error that is worth a second try."""

    def __init__(self, before: Callable[[], object] = lambda: None) -> None:
        self.before = before
        self.attempts = 0

    def __call__(self) -> None:
        self.attempts += 1
        self.before()
        raise Retry
