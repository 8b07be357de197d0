"""An application to be mounted in the others, which has a SessionMiddleware of its own.

It adds a note and tells whether its middleware joined the scope of the request around it
("joined") or opened one of its own ("own"). The path "/book" makes the commit fail.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.frameworks.apps.database import Session, add_orphan
from tests.support.models import Note
from wsgi_dbsession import SessionMiddleware, current_scope

if TYPE_CHECKING:
    from collections.abc import Iterable

    from _typeshed.wsgi import StartResponse, WSGIEnvironment


def mounted(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Remember the scope outside the inner middleware, and call it."""
    environ["tests.outer_scope"] = current_scope()
    return _wrapped(environ, start_response)


def _app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    Session.add(Note(text="mounted"))
    if environ["PATH_INFO"] == "/book":
        add_orphan()
    joined = current_scope() is environ["tests.outer_scope"]
    start_response("201 Created", [("Content-Type", "text/plain")])
    return [b"joined" if joined else b"own"]


_wrapped = SessionMiddleware(_app, Session)
