"""The write callable of PEP 3333: what is written is sent at once, and is stored."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from tests.idempotency.shop import KEY, Note, Shop, order, protect
from tests.support.wsgi import Server, make_environ

if TYPE_CHECKING:
    from collections.abc import Iterable

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from sqlalchemy.orm import Session, scoped_session

    from tests.idempotency.shop import Place

TEXT = ("Content-Type", "text/plain")


def test_what_is_written_is_sent_at_once(registry: scoped_session[Session], sqlite: Place) -> None:
    """PEP 3333 asks for that; the rest comes after it, and all of it is replayed."""
    server = Server()

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        write = start_response("200 OK", [TEXT])
        for block in (b"a", b"b"):
            registry.add(Note(text=block.decode()))
            write(block)
            server.trace.append("written")
        return (b"c", b"d")

    protected = protect(app, registry)
    environ = make_environ("POST", "/orders", b"tea", HTTP_IDEMPOTENCY_KEY=KEY)
    server.run(protected, environ)

    assert server.trace == [
        *("start 200", "block a", "written", "block b", "written"),
        *("block c", "block d", "end"),
    ]
    assert order(protected).body == b"abcd"
    assert sqlite.notes() == ["a", "b"]


def test_what_is_written_counts_with_what_is_returned(registry: scoped_session[Session]) -> None:
    """A generator with a length, after a ``write()``."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        write = start_response("200 OK", [TEXT, ("Content-Length", "3")])
        write(b"a")
        return iter([b"b", b"c"])

    protected = protect(app, registry)
    assert order(protected).body == b"abc"
    assert order(protected).body == b"abc"


def test_a_response_that_write_completes_is_stored_by_then(
    registry: scoped_session[Session],
) -> None:
    """Its client may repeat the request while the application still runs."""
    again: list[bytes] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        write = start_response("200 OK", [TEXT, ("Content-Length", "2")])
        write(b"a")
        write(b"b")
        again.append(order(protected).body)
        return []

    protected = protect(app, registry)
    order(protected)
    assert again == [b"ab"]


def test_a_stream_after_a_write_is_done(registry: scoped_session[Session]) -> None:
    """It is marked once, and its response is not stored."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        write = start_response("200 OK", [TEXT])
        write(b"a")
        return iter([b"b"])

    protected = protect(app, registry)
    assert order(protected).body == b"ab"
    assert order(protected).code == "not_stored"


def caught_out_of_write(registry: scoped_session[Session], *blocks: bytes) -> WSGIApplication:
    """Make an application that loses its key, and does not care about the error."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        write = start_response("200 OK", [TEXT, ("Content-Length", "2")])
        registry.rollback()
        assert order(protect(Shop(registry), registry)).status == "201 Created"
        registry.add(Note(text="too late"))
        for block in blocks:
            with contextlib.suppress(Exception):
                write(block)
        return []

    return app


@pytest.mark.parametrize("blocks", [(b"ab",), (b"a", b"b")], ids=["at once", "in two"])
def test_an_error_that_is_caught_out_of_write_is_not_a_success(
    blocks: tuple[bytes, ...], registry: scoped_session[Session], sqlite: Place
) -> None:
    """Another request took the key: nothing was sent, so the client gets a 409."""
    reply = order(protect(caught_out_of_write(registry, *blocks), registry))

    assert reply.code == "in_progress"
    assert sqlite.notes() == ["tea"]


def test_after_a_block_was_sent_a_lost_key_cuts_the_response(
    registry: scoped_session[Session], sqlite: Place
) -> None:
    """It is too late for another response: the server gets the error."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        write = start_response("200 OK", [TEXT, ("Content-Length", "2")])
        write(b"a")
        registry.rollback()
        assert order(protect(Shop(registry), registry)).status == "201 Created"
        registry.add(Note(text="too late"))
        write(b"b")
        return []

    with pytest.raises(Exception, match="took the Idempotency-Key"):
        order(protect(app, registry))

    assert sqlite.notes() == ["tea"]
