"""The application of these tests, and a client with cookies.

It adds a note by POST, and counts by GET; it says which server it was on.
"""

from __future__ import annotations

from http.cookies import SimpleCookie
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select, text

from tests.replica.tables import Note
from tests.support.wsgi import ask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from sqlalchemy.orm import Session, scoped_session

PORT = text("SELECT current_setting('port')")


def make_application(
    registry: scoped_session[Session], **views: Callable[[], object]
) -> WSGIApplication:
    """Return an application with these views besides its own two, named by their paths."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"].strip("/")
        if path in views:
            body = str(views[path]())
        elif environ["REQUEST_METHOD"] == "POST":
            note = Note(text=path)
            registry.add(note)
            registry.flush()
            body = str(note.id)
        else:
            found = registry.scalar(select(func.count()).select_from(Note))
            body = f"{found} on {registry.scalar(PORT)}"
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [body.encode()]

    return app


class CookieJar:
    """The cookies of a client, as browsers keep them."""

    def __init__(self) -> None:
        self.cookies: dict[str, str] = {}

    def header(self) -> str:
        """Return what the client sends."""
        return "; ".join(f"{name}={value}" for name, value in self.cookies.items())

    def keep(self, set_cookie: Iterable[str]) -> None:
        """Do what the headers of a response say."""
        for header in set_cookie:
            for name, morsel in SimpleCookie(header).items():
                if morsel["max-age"] == "0":
                    self.cookies.pop(name, None)
                else:
                    self.cookies[name] = morsel.value


class Client(CookieJar):
    """A client without a network."""

    def __init__(self, app: WSGIApplication) -> None:
        super().__init__()
        self.app = app
        self.errors: list[BaseException] = []

    def send(self, method: str, path: str, **environ: Any) -> str:
        """Send a request and return the body of a success, "" of an error."""
        kept: list[str] = []

        def collect(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            def start(
                status: str, headers: list[tuple[str, str]], *rest: Any
            ) -> Callable[[bytes], object]:
                kept[:] = [value for name, value in headers if name == "Set-Cookie"]
                return start_response(status, headers, *rest)

            return self.app(environ, start)

        reply = ask(collect, method, path, HTTP_COOKIE=self.header(), **environ)
        self.keep(kept)
        self.errors = reply.errors
        return reply.body.decode() if reply.status.startswith("200") else ""

    def post(self, path: str = "/note") -> str:
        return self.send("POST", path)

    def get(self, path: str = "/") -> str:
        return self.send("GET", path)
