"""Programs that break a promise, and must be caught in every run: else the checker is blind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import Session, scoped_session, sessionmaker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from sqlalchemy import Engine

    Body = Iterable[bytes]
    Registry = scoped_session[Session]
    Views = Callable[[Registry, Registry], WSGIApplication]


@dataclass(frozen=True)
class Control:
    """A wrong program, and which violation gives it away."""

    name: str
    #: what is wrong with it, for the report
    wrong: str
    #: the kinds of violation of which one at least must be found
    caught_by: tuple[str, ...]
    #: the only transfers that are sent
    shapes: tuple[tuple[str, str, str], ...]
    faults: tuple[str, ...] = ()


LOST = "success without its transfer"
LATE = "success that a later reader does not see"
CONTROLS = [
    Control(
        "after_request",
        "a thread-local session, committed when the view returns, removed afterwards",
        (LOST,),
        (("plain", "unsized", "transfer"), ("plain", "sized", "transfer")),
    ),
    Control(
        "commit in close()",
        "a commit by hand in the close() of the response",
        (LOST, LATE),
        (("plain", "list", "deferred constraint"), ("plain", "sized", "transfer")),
    ),
]


def apply(name: str) -> None:
    """Remove a rule of the package in this process, if that is what the control does."""
    change = CHANGES.get(name)
    if change is not None:
        change()


CHANGES: dict[str, Callable[[], None]] = {}


def mounts(
    name: str, views: Views, mounts: Mapping[str, WSGIApplication], engine: Engine
) -> dict[str, WSGIApplication]:
    """Return what stands in for the package's middleware in this process."""
    session = scoped_session(sessionmaker(engine))
    if name == "after_request":
        return {"plain": AfterRequest(views(session, session), session)}
    if name == "commit in close()":
        return {"plain": CommitInClose(views(session, session), session)}
    return {}


class AfterRequest:
    """What the documentation of many frameworks shows."""

    def __init__(self, app: WSGIApplication, session: Registry) -> None:
        self.app = app
        self.session = session

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Body:
        try:
            body = self.app(environ, start_response)
            self.session.commit()
            return body
        except BaseException:
            self.session.rollback()
            raise
        finally:
            self.session.remove()


class CommitInClose:
    """A commit as late as possible: the client has its response by then."""

    def __init__(self, app: WSGIApplication, session: Registry) -> None:
        self.app = app
        self.session = session

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Body:
        try:
            body = self.app(environ, start_response)
        except BaseException:
            self.session.remove()
            raise
        return Closing(body, self.session)


class Closing:
    """The body of a response, with a commit at its end."""

    def __init__(self, body: Body, session: Registry) -> None:
        self.body = body
        self.session = session

    def __iter__(self) -> Iterator[bytes]:
        yield from self.body

    def close(self) -> None:
        """Commit and remove."""
        close: Any = getattr(self.body, "close", None)
        if close is not None:
            close()
        try:
            self.session.commit()
        finally:
            self.session.remove()
