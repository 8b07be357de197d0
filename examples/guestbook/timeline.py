"""What happens during a request, in order and in plain words, for the page of the demo.

Nothing here is written in advance. Each line comes from an event: a call across the WSGI border,
seen on both sides of the middleware, an event of SQLAlchemy, or a method of ``Observer``.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sqlalchemy import event

from wsgi_dbsession import Observer, find_scope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from sqlalchemy import Connection, Engine
    from sqlalchemy.engine import ExceptionContext

    from wsgi_dbsession import Scope, SessionMiddleware

KEY = "guestbook.timeline"  # in a request's environ, and in the info of its connection


@dataclass
class Line:
    """One thing that happened."""

    actor: str
    """"server", "middleware", "application" or "database"."""
    text: str
    code: str = ""
    """SQL, a status or an error."""


@dataclass
class Timeline:
    """One request."""

    address: str
    status: str = ""
    """What the server sent, empty before the start."""
    newest: bool = True
    whole: bool = False
    closed: bool = False
    lines: list[Line] = field(default_factory=list)

    def add(self, actor: str, text: str, code: object = "") -> None:
        """Append a line."""
        self.lines.append(Line(actor, text, " ".join(str(code).split())))

    @property
    def result(self) -> str:
        """What the client has."""
        if not self.closed:
            return "The response is still on its way. Reload the page to see its end."
        if not self.status:
            return "The client got no response."
        end = "a whole response" if self.whole else "part of a response"
        return f"The client got {end}: {self.status}."


REASONS = {
    "error": "The application raised an error.",
    "veto": "The status is 4xx or 5xx.",
    "incomplete": "The response was not sent in full.",
}


def timeline_of(scope: Scope | None) -> Timeline | None:
    """Return the timeline of the request of a scope, if it has one."""
    environ = None if scope is None else scope.environ
    return None if environ is None else environ.get(KEY)


class Recorder(Observer):
    """A WSGI middleware around the :class:`SessionMiddleware` that keeps timelines of each POST.

    :param middleware: it gets an observer, and a wrapper around the application inside of it.
    :param engine: its events are recorded.
    """

    def __init__(self, middleware: SessionMiddleware, engine: Engine) -> None:
        self._outer = middleware
        self._inner = middleware.app
        self._recent: deque[Timeline] = deque(maxlen=20)
        middleware.app = self._call_application
        middleware.observers += (self,)
        listen(engine)

    def last(self, address: str) -> Timeline | None:
        """Return the last request to an address, such as ``/sign``."""
        return next((each for each in self._recent if each.address == address), None)

    # -- WSGI, outside and inside of the middleware -----------------------------------------------

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Handle one request."""
        if environ["REQUEST_METHOD"] != "POST":
            return self._outer(environ, start_response)
        query = environ.get("QUERY_STRING")
        timeline = Timeline(environ["PATH_INFO"] + (f"?{query}" if query else ""))
        environ[KEY] = timeline
        for older in self._recent:
            older.newest = False
        self._recent.appendleft(timeline)

        def start(status: str, headers: list[tuple[str, str]], *more: Any) -> Callable[..., Any]:
            timeline.status = status
            timeline.add("server", "The start of the response reaches the server:", status)
            return start_response(status, headers, *more)

        timeline.add("server", "The server calls the application.")
        try:
            return Released(self._outer(environ, start), timeline)
        except BaseException as error:
            timeline.add("server", "The call raises an error into the server:", error)
            timeline.closed = True
            raise

    def _call_application(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        timeline: Timeline | None = environ.get(KEY)
        if timeline is None:
            return self._inner(environ, start_response)

        def start(status: str, headers: list[tuple[str, str]], *more: Any) -> Callable[..., Any]:
            timeline.add("application", "The application starts a response:", status)
            write = start_response(status, headers, *more)
            if not timeline.status:
                timeline.add("middleware", "The middleware holds that start.")
            return write

        return self._inner(environ, start)

    # -- the scope --------------------------------------------------------------------------------

    def opened(self, scope: Scope) -> None:
        """Record that the middleware begins."""
        _add(scope, "The middleware opens a scope.")

    def settled(self, scope: Scope) -> None:
        """Record the outcome."""
        if scope.failure is not None:
            _add(scope, f"The commit failed, and its outcome is: {scope.outcome}.", scope.failure)
        elif scope.outcome == "commit":
            _add(scope, "The outcome is: commit.")
        else:
            why = REASONS.get(str(scope.reason), scope.reason)
            _add(scope, f"The outcome is: {scope.outcome}. {why}")

    def closed(self, scope: Scope) -> None:
        """Record that the middleware has finished."""
        _add(scope, "The Session is closed, and the scope ends.")


def _add(scope: Scope, text: str, code: object = "") -> None:
    timeline = timeline_of(scope)
    if timeline is not None:
        timeline.add("middleware", text, code)


class Released:
    """A response on its way to the server."""

    def __init__(self, blocks: Iterable[bytes], timeline: Timeline) -> None:
        self._blocks = blocks
        self._iterator = iter(blocks)
        self._timeline = timeline

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            block = next(self._iterator)
        except StopIteration:
            self._timeline.whole = True
            self._timeline.add("server", "The body is complete.")
            raise
        except BaseException as error:
            self._timeline.add("server", "The middleware raises an error into the server:", error)
            raise
        self._timeline.add("server", f"A block of {len(block)} bytes reaches the server.")
        return block

    def close(self) -> None:
        """Close the response, as a server must."""
        if not self._timeline.whole:
            self._timeline.add("server", "The client has gone. The server closes the response.")
        try:
            close = getattr(self._blocks, "close", None)
            if close is not None:
                close()
        finally:
            self._timeline.closed = True


# -- SQLAlchemy -----------------------------------------------------------------------------------


def listen(engine: Engine) -> None:
    """Record what the engine and its pool do for requests."""

    def checkout(_: object, record: Any, __: object) -> None:
        timeline = record.info[KEY] = timeline_of(find_scope())
        if timeline is not None:
            timeline.add("database", "The Session takes a connection from the pool.")

    def checkin(_: object, record: Any) -> None:
        timeline = record.info.pop(KEY, None)
        if timeline is not None:
            timeline.add("database", "The connection is back in the pool.")

    def add(connection: Connection | None, text: str, code: object = "") -> None:
        timeline = None if connection is None else connection.info.get(KEY)
        if timeline is not None:
            timeline.add("database", text, code)

    def begin(connection: Connection) -> None:
        add(connection, "A transaction begins.")

    def execute(connection: Connection, _: object, statement: str, *__: object) -> None:
        add(connection, "The Session sends", statement)

    def commit(connection: Connection) -> None:
        add(connection, "The Session sends", "COMMIT")

    def rollback(connection: Connection) -> None:
        add(connection, "The Session sends", "ROLLBACK")

    def refuse(context: ExceptionContext) -> None:
        add(context.connection, "The database refuses:", context.original_exception)

    event.listen(engine, "checkout", checkout)
    event.listen(engine, "checkin", checkin)
    event.listen(engine, "begin", begin)
    event.listen(engine, "before_cursor_execute", execute)
    event.listen(engine, "commit", commit)
    event.listen(engine, "rollback", rollback)
    event.listen(engine, "handle_error", refuse)
