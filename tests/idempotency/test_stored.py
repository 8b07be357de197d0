"""What is stored of a response: its length, its headers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.idempotency.shop import KEY, order, protect
from tests.support.wsgi import Server, make_environ

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from sqlalchemy.orm import Session, scoped_session

    from tests.idempotency.shop import Place

TEXT = ("Content-Type", "text/plain")


# -- lengths --------------------------------------------------------------------------------------


def answering(
    *blocks: bytes, status: str = "200 OK", headers: Any = (TEXT,), kind: Any = list
) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response(status, list(headers))
        result: Iterable[bytes] = kind(blocks)
        return result

    return app


@pytest.mark.parametrize("kind", [list, tuple, iter])
@pytest.mark.parametrize(("size", "is_stored"), [(8, True), (9, False)])
def test_a_body_is_stored_up_to_a_limit(
    size: int, is_stored: bool, kind: Any, registry: scoped_session[Session]
) -> None:
    """``max_response`` bytes; a longer one is done, and says so."""
    blocks = [b"x" * (size - 1), b"x"]
    headers = [TEXT, ("Content-Length", str(size))]
    app = protect(answering(*blocks, headers=headers, kind=kind), registry, max_response=8)

    assert order(app).body == b"x" * size
    again = order(app)
    if is_stored:
        assert again.body == b"x" * size
    else:
        assert again.code == "not_stored"


@pytest.mark.parametrize("kind", [list, tuple, iter])
@pytest.mark.parametrize("length", ["3", "5", "three", "4, 5"])
def test_a_body_of_another_length_than_it_claims_is_not_stored(
    length: str, kind: Any, registry: scoped_session[Session]
) -> None:
    """The client takes it for cut, or cuts it; with "three" it is a stream."""
    app = protect(
        answering(b"four", headers=[TEXT, ("Content-Length", length)], kind=kind), registry
    )
    order(app)
    again = order(app)

    if (length, kind) in [("three", list), ("three", tuple), ("4, 5", list), ("4, 5", tuple)]:
        assert again.body == b"four"
    elif length == "4, 5":
        assert again.is_replayed
    else:
        assert again.code == "not_stored"


@pytest.mark.parametrize("kind", [list, tuple, iter])
@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified", "201 Created"])
def test_an_empty_body_is_replayed(
    status: str, kind: Any, registry: scoped_session[Session]
) -> None:
    """Without a Content-Length where there must be none."""
    headers = [("Content-Length", "0")] if status == "201 Created" else []
    app = protect(answering(status=status, headers=headers, kind=kind), registry)
    order(app)
    again = order(app)

    assert (again.status, again.body, again.is_replayed) == (status, b"", True)
    assert again.headers.get("Content-Length") == ("0" if headers else None)


def test_a_generator_without_blocks_is_replayed(registry: scoped_session[Session]) -> None:
    """It started the response, and ended before the first block: that is the whole body."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("201 Created", [])
        yield from ()

    protected = protect(app, registry)
    assert order(protected).body == b""
    assert order(protected).is_replayed


def test_any_bytes_are_replayed(place: Place) -> None:
    """A megabyte of them, from each database."""
    body = bytes(range(256)) * 4096
    app = protect(answering(body, headers=[TEXT, ("X-Text", "\xe9")]), place.registry())

    order(app)
    again = order(app)

    assert again.is_replayed
    assert again.body == body
    assert again.headers["X-Text"] == "\xe9"


def test_a_long_status_does_not_break_the_request(place: Place) -> None:
    """The table has 255 characters for it."""
    status = f"200 {'very ' * 100}OK"
    app = protect(answering(b"", status=status), place.registry())

    assert order(app).status == status
    assert order(app).status == status[:255]


# -- headers --------------------------------------------------------------------------------------

HEADERS = [
    ("Content-Type", "text/plain"),
    ("Date", "Tue, 15 Nov 1994 08:12:31 GMT"),
    ("Location", "/notes/1"),
    ("SET-COOKIE", "session=secret"),
    ("Set-Cookie", "other=secret"),
    ("Connection", "close"),
    ("X-Tag", "a"),
    ("X-Tag", "b"),
]


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        pytest.param(
            None,
            [*(HEADERS[index] for index in (0, 2, 6, 7))],
            id="all but cookies, date, hop by hop",
        ),
        pytest.param(["LOCATION", "content-length"], [HEADERS[2]], id="one, in any case"),
        pytest.param({"set-cookie"}, HEADERS[3:5], id="cookies, as was asked for"),
        pytest.param([], [], id="none"),
    ],
)
def test_headers_are_chosen(
    chosen: Any, expected: list[tuple[str, str]], registry: scoped_session[Session]
) -> None:
    """In their order, and each as often as it was there."""
    app = protect(answering(b"x", headers=HEADERS), registry, headers=chosen)
    order(app)
    server = Server()
    server.run(app, make_environ("POST", "/orders", b"tea", HTTP_IDEMPOTENCY_KEY=KEY))

    assert server.headers == [
        *expected,
        ("Content-Length", "1"),
        ("Idempotent-Replayed", "true"),
    ]


def test_the_server_gets_the_headers_of_the_application(registry: scoped_session[Session]) -> None:
    """The very list: what a hook appends to it reaches the client."""
    headers = [TEXT]

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", headers)
        return [b""]

    server = Server()
    server.run(protect(app, registry), make_environ("POST", HTTP_IDEMPOTENCY_KEY=KEY))

    assert server.headers is headers
