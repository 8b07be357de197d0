"""Bare WSGI."""

from __future__ import annotations

from typing import TYPE_CHECKING

import repoze.tm
from sqlalchemy.orm import scoped_session, sessionmaker

from benchmarks.applications.common import (
    BIG,
    DATABASE_ROUTES,
    PLAIN,
    SELECT,
    SIZED,
    Operation,
    Run,
    blocks,
    by_hand,
    committing,
    endless,
    our_registry,
    plain,
    watched,
    zope_registry,
)
from wsgi_dbsession import SessionMiddleware

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from sqlalchemy import Engine


class Sized:
    """A body of one block that is no list, as frameworks return it."""

    __slots__ = ("_blocks",)

    def __init__(self, block: bytes) -> None:
        self._blocks = iter((block,))

    def __iter__(self) -> Iterator[bytes]:
        return self._blocks

    def close(self) -> None:
        pass


def bare_application(run: Run | None) -> WSGIApplication:
    def as_list(_: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", SIZED)
        return [b"hello"]

    def sized(_: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", SIZED)
        return Sized(b"hello")

    def stream(_: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", PLAIN)
        return blocks("hello")

    def stream_of_one(_: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", PLAIN)
        return blocks("hello", 1)

    routes: dict[str, WSGIApplication] = {
        "/": as_list,
        "/sized": sized,
        "/stream": stream,
        "/stream-of-one": stream_of_one,
    }

    def add(path: str, operation: Operation) -> None:
        assert run is not None

        def view(_: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            block = run(operation).encode()
            start_response("200 OK", [*PLAIN, ("Content-Length", str(len(block)))])
            return [block]

        routes[path] = view

    def select_sized(_: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        assert run is not None
        text = run(SELECT)
        start_response("200 OK", SIZED)
        return Sized(text.encode())

    def select_stream(_: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        assert run is not None
        text = run(SELECT)
        start_response("200 OK", PLAIN)
        return blocks(text)

    def big(_: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        assert run is not None
        run(SELECT)
        start_response("200 OK", [*PLAIN, ("Content-Length", str(len(BIG)))])
        return [BIG]

    def big_stream(_: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        assert run is not None
        text = run(SELECT)
        start_response("200 OK", PLAIN)
        return endless(text)

    if run is not None:
        for path, operation in DATABASE_ROUTES.items():
            add(path, operation)
        routes["/select-sized"] = select_sized
        routes["/select-stream"] = select_stream
        routes["/big"] = big
        routes["/big-stream"] = big_stream

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        return routes[environ["PATH_INFO"]](environ, start_response)

    return application


class Closing:
    """Calls a function when the response is closed, as werkzeug.wsgi.ClosingIterator does."""

    __slots__ = ("_close", "_iterable", "_next")

    def __init__(self, iterable: Iterable[bytes], close: Callable[[], None]) -> None:
        self._iterable = iterable
        self._next = iter(iterable).__next__
        self._close = close

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return self._next()

    def close(self) -> None:
        try:
            close = getattr(self._iterable, "close", None)
            if close is not None:
                close()
        finally:
            self._close()


def bare_none(engine: Engine) -> WSGIApplication:
    return bare_application(None)


def bare_by_hand(engine: Engine) -> WSGIApplication:
    return bare_application(by_hand(engine))


def bare_thread_local(engine: Engine) -> WSGIApplication:
    registry = scoped_session(sessionmaker(engine))
    application = bare_application(committing(registry))

    def with_teardown(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            iterable = application(environ, start_response)
        except BaseException:
            registry.remove()
            raise
        return Closing(iterable, registry.remove)

    return with_teardown


def bare_repoze_tm(engine: Engine) -> WSGIApplication:
    application: WSGIApplication = repoze.tm.TM(
        bare_application(plain(zope_registry(engine))), repoze.tm.default_commit_veto
    )
    return application


def bare_ours(engine: Engine) -> WSGIApplication:
    registry = our_registry(engine)
    return SessionMiddleware(bare_application(plain(registry)), registry)


def bare_watched(engine: Engine) -> WSGIApplication:
    registry = our_registry(engine)
    application = SessionMiddleware(bare_application(plain(registry)), registry)
    board: WSGIApplication = watched(application, registry)
    return board


def bare_ours_on_headers(engine: Engine) -> WSGIApplication:
    registry = our_registry(engine)
    return SessionMiddleware(bare_application(plain(registry)), registry, commit_on="headers")
