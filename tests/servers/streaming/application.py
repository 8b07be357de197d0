"""Server-Sent Events, slow requests and quick ones, over a pool of five connections.

Below ``/held`` the same with ``commit_on="complete"``, where a stream holds its connection.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from sqlalchemy import create_engine, text
from sqlalchemy.orm import scoped_session, sessionmaker

from wsgi_dbsession import SessionMiddleware, current_scope, session_scope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from sqlalchemy.orm import Session

    Registry = scoped_session[Session]

logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")

PATIENCE = 60  # seconds after which something has failed
COUNT = text("SELECT count(*) FROM note WHERE token LIKE :run || '%'")
INSERT = text("INSERT INTO note VALUES (:token)")
PAGE = """<!doctype html><title>Streams</title><link rel="icon" href="data:,">
<p id="count">none</p><script>
  const source = new EventSource("/events" + location.search);
  source.onmessage = event => { count.textContent = event.data };
</script>"""


def make_registry(**options: Any) -> Registry:
    engine = create_engine(os.environ["DATABASE_URL"], pool_size=5, max_overflow=0, **options)
    return scoped_session(sessionmaker(engine), scopefunc=current_scope)


class News:
    """Tells all that wait when something is new."""

    def __init__(self) -> None:
        self.number = 0
        self.changed = threading.Condition()

    def publish(self) -> None:
        with self.changed:
            self.number += 1
            self.changed.notify_all()

    def wait(self, number: int) -> int:
        """Wait for a later number, or for a time at which a stream says that it is there."""
        with self.changed:
            self.changed.wait_for(lambda: self.number > number, PATIENCE)
            return self.number


class Streaming:
    """One application, with a pool of its own."""

    def __init__(self, **options: Any) -> None:
        self.session = make_registry(**options)
        self.news = News()
        self.open: list[object] = []
        self.slow: set[str] = set()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        view: Callable[..., Any] = getattr(self, environ["PATH_INFO"].strip("/") or "page")
        query = {key: value[-1] for key, value in parse_qs(environ["QUERY_STRING"]).items()}
        if view == self.events:
            start_response("200 OK", [("Content-Type", "text/event-stream")])
            return self.events(**query)
        body = view(**query).encode()
        headers = [("Content-Type", "text/html"), ("Content-Length", str(len(body)))]
        start_response("200 OK", headers)
        return [body]

    def page(self, run: str) -> str:
        return PAGE

    def events(self, run: str) -> Iterator[bytes]:
        me = object()
        self.open.append(me)
        try:
            number = self.news.number
            # It begins the transaction of the request, which would last as long as the stream.
            count = self.session.scalar(COUNT, {"run": run})
            while True:
                yield f"data: {count}\n\n".encode()
                number = self.news.wait(number)
                with session_scope(self.session):
                    count = self.session.scalar(COUNT, {"run": run})
        finally:
            self.open.remove(me)

    def add(self, token: str) -> str:
        self.session.execute(INSERT, {"token": token})
        current_scope().on_commit(self.news.publish)
        return "added"

    def wake(self) -> str:
        self.news.publish()
        return "woken"

    def wait(self, run: str, token: str, among: str) -> str:
        """Read, wait until so many requests wait here, and write."""
        before = self.session.scalar(COUNT, {"run": run})
        with current_scope().released(), self.news.changed:
            self.slow.add(token)
            self.news.changed.notify_all()
            there = self.news.changed.wait_for(lambda: len(self.slow) >= int(among), PATIENCE)
        self.session.execute(INSERT, {"token": token})
        return f"{before}, {there}"

    def state(self) -> str:
        pool: Any = self.session.session_factory.kw["bind"].pool
        return json.dumps({"connections": pool.checkedout(), "streams": len(self.open)})


streams = Streaming(pool_timeout=PATIENCE)
held = Streaming(pool_timeout=1)
auto: WSGIApplication = SessionMiddleware(streams, streams.session, commit_on="auto")
complete: WSGIApplication = SessionMiddleware(held, held.session)


def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    path = environ["PATH_INFO"]
    if path.startswith("/held/"):
        environ["PATH_INFO"] = path.removeprefix("/held")
        return complete(environ, start_response)
    return auto(environ, start_response)
