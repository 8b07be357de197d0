"""Which requests are concerned, which are equal, and which are refused before they run."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.orm import scoped_session, sessionmaker

from tests.idempotency.shop import KEY, KEYS, Place, Shop, order, protect, user_of
from wsgi_dbsession import SessionMiddleware, current_scope
from wsgi_dbsession.idempotency import Idempotency
from wsgi_dbsession.replica import read_only_engine, session_class

if TYPE_CHECKING:
    from collections.abc import Iterable

    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from sqlalchemy.orm import Session


def test_a_repeated_request_gets_the_stored_response(app: Any, shop: Shop, sqlite: Place) -> None:
    """Status, body and headers are those of the first, and the application is not called."""
    first = order(app)
    again = order(app)

    assert (again.status, again.body) == (first.status, first.body) == ("201 Created", b"note 1")
    assert first.headers["Set-Cookie"] == "session=secret"
    assert not first.is_replayed
    assert again.headers == {
        "Content-Type": "text/plain",
        "Location": "/notes/1",
        "Content-Length": "6",
        "Idempotent-Replayed": "true",
    }
    assert shop.calls == 1
    assert sqlite.notes() == ["tea"]


def test_another_key_is_another_request(app: Any, shop: Shop, sqlite: Place) -> None:
    """The same order under a second key takes effect again."""
    order(app)
    again = order(app, key=KEY.upper())

    assert not again.is_replayed
    assert sqlite.notes() == ["tea", "tea"]


def test_a_request_without_a_key_has_no_row(app: Any, shop: Shop, sqlite: Place) -> None:
    """It runs as if the middleware were not there."""
    order(app, key=None)
    again = order(app, key=None)

    assert not again.is_replayed
    assert sqlite.notes() == ["tea", "tea"]
    assert sqlite.keys() == []


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "TRACE"])
def test_a_safe_method_is_let_through(method: str, shop: Shop, sqlite: Place) -> None:
    """Its key is ignored, and none is required."""
    app = protect(shop, shop.registry, required=True)
    order(app, method=method)
    order(app, method=method, key=None)

    assert shop.calls == 2
    assert sqlite.keys() == []


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "ORDER"])
def test_every_other_method_is_handled(method: str, app: Any, shop: Shop) -> None:
    """Those that HTTP calls idempotent, too: their responses are not."""
    order(app, method=method)

    assert order(app, method=method).is_replayed
    assert shop.calls == 1


def test_the_application_finds_the_key(registry: scoped_session[Session]) -> None:
    """Unquoted, so that it can be passed on to a service that it calls."""
    seen: list[object] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        seen.append(environ.get("wsgi_dbsession.idempotency_key"))
        start_response("204 No Content", [])
        return []

    order(protect(app, registry), key='"a \\"b\\" \\\\ c"')
    order(protect(app, registry), key=None)

    assert seen == ['a "b" \\ c', None]


# -- keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "equal"),
    [
        pytest.param(KEY, f'"{KEY}"', id="plain and quoted"),
        pytest.param(KEY, f" \t{KEY} ", id="white space around it"),
        pytest.param("order 17; final", '"order 17; final"', id="with spaces"),
        pytest.param('a"b', '"a\\"b"', id="with a quote"),
        pytest.param("a\\b", '"a\\\\b"', id="with a backslash"),
        pytest.param("!~", '"!~"', id="first and last character"),
        pytest.param("k" * 255, f'"{"k" * 255}"', id="longest"),
        pytest.param('"a, b"', '"a, b"', id="with a comma, quoted"),
    ],
)
def test_a_key_may_be_written_in_two_ways(key: str, equal: str, app: Any) -> None:
    """As most APIs have it, and as a string of RFC 8941, which the IETF's draft asks for."""
    order(app, key=key)

    assert order(app, key=equal).is_replayed


@pytest.mark.parametrize(
    "key",
    [
        pytest.param("", id="empty"),
        pytest.param("  ", id="white space"),
        pytest.param('""', id="empty and quoted"),
        pytest.param("k" * 256, id="too long"),
        pytest.param(f'"{"k" * 256}"', id="too long and quoted"),
        pytest.param("a,b", id="sent twice"),
        pytest.param('"a", "b"', id="sent twice, quoted"),
        pytest.param('"a', id="not closed"),
        pytest.param('"a\\', id="ends in a backslash"),
        pytest.param('"a\\b"', id="escape of nothing"),
        pytest.param('"a";b=c', id="with a parameter"),
        pytest.param("a\tb", id="control character"),
        pytest.param("a\nb", id="line feed"),
        pytest.param("key\n", id="line feed at the end"),
        pytest.param('"a\x7f"', id="DEL, quoted"),
        pytest.param("caf\xe9", id="not ASCII"),
        pytest.param('"caf\xe9"', id="not ASCII, quoted"),
    ],
)
def test_what_is_not_a_key_is_refused(key: str, app: Any, shop: Shop) -> None:
    """With 400, before the application is called."""
    reply = order(app, key=key)

    assert (reply.status, reply.code) == ("400 Bad Request", "key_invalid")
    assert shop.calls == 0


@pytest.mark.parametrize(
    "required", [True, lambda environ: environ["PATH_INFO"] == "/orders"], ids=["all", "some"]
)
def test_a_missing_key_is_refused_where_it_is_required(required: Any, shop: Shop) -> None:
    """With 400, before the application is called."""
    app = protect(shop, shop.registry, required=required)

    reply = order(app, key=None)

    assert (reply.status, reply.code) == ("400 Bad Request", "key_missing")
    assert shop.calls == 0
    assert order(app).status == "201 Created"


def test_a_missing_key_is_accepted_where_it_is_not_required(shop: Shop) -> None:
    """The callable decides on each request."""
    app = protect(shop, shop.registry, required=lambda environ: environ["PATH_INFO"] == "/pay")

    assert order(app, key=None).status == "201 Created"


# -- fingerprints ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"body": b"coffee"}, id="body"),
        pytest.param({"body": b""}, id="no body"),
        pytest.param({"method": "PUT"}, id="method"),
        pytest.param({"path": "/payments"}, id="path"),
        pytest.param({"SCRIPT_NAME": "/shop"}, id="mounted elsewhere"),
        pytest.param({"QUERY_STRING": "dry_run=1"}, id="query"),
        pytest.param({"path": "/orderst", "body": b"ea"}, id="moved from body to path"),
    ],
)
def test_a_key_is_not_used_for_another_request(
    other: dict[str, Any], app: Any, shop: Shop, sqlite: Place
) -> None:
    """With 422; the first response is still there."""
    order(app)

    reply = order(app, **other)

    assert (reply.status, reply.code) == ("422 Unprocessable Content", "key_reused")
    assert order(app).is_replayed
    assert sqlite.notes() == ["tea"]


def test_a_path_is_the_same_wherever_it_is_split(app: Any) -> None:
    """A mounted application is the same application."""
    order(app, path="/shop/orders")

    assert order(app, path="/orders", SCRIPT_NAME="/shop").is_replayed


def test_any_path_has_a_fingerprint(app: Any) -> None:
    """Also with what a careless client or server leaves in the environ."""
    for path in ("/\udcff", "/\xff", "/\u20ac", "/\0"):
        assert order(app, path=path, key=ascii(path)).status == "201 Created"


# -- principals -----------------------------------------------------------------------------------


def test_a_response_is_for_its_principal_only(app: Any, sqlite: Place) -> None:
    """Another one's request with the same key is another request."""
    replies = [
        order(app, REMOTE_USER="ann"),
        order(app, REMOTE_USER="bob"),
        order(app),
        order(app, REMOTE_USER="ann"),
    ]

    assert [reply.body for reply in replies] == [b"note 1", b"note 2", b"note 3", b"note 1"]
    assert [reply.is_replayed for reply in replies] == [False, False, False, True]


def test_principal_and_key_do_not_run_into_each_other(app: Any) -> None:
    """What moves from one to the other makes a difference."""
    order(app, key="bc", REMOTE_USER="a")

    assert not order(app, key="c", REMOTE_USER="ab").is_replayed


def test_a_principal_is_a_string(registry: scoped_session[Session]) -> None:
    """Two objects with the same text are not to be mixed up in silence."""
    app = protect(Shop(registry), registry, principal=lambda environ: 5)

    with pytest.raises(TypeError, match="principal must be a str, got 5"):
        order(app)


def test_an_error_of_the_principal_is_raised(registry: scoped_session[Session]) -> None:
    """The application is not called for an unknown principal."""
    shop = Shop(registry)
    app = protect(shop, registry, principal=lambda environ: environ["missing"])

    with pytest.raises(KeyError):
        order(app)
    assert shop.calls == 0


# -- bodies ---------------------------------------------------------------------------------------


class Slow(io.BytesIO):
    """An input that returns a byte at a time, and must not be read beyond its end."""

    def __init__(self, body: bytes, *, ends: bool) -> None:
        super().__init__(body)
        self.ends = ends

    def read(self, size: int | None = -1, /) -> bytes:
        block = super().read(min(1, size or 1))
        assert block or self.ends or size == 0, "some servers would wait for the next request"
        return block


def test_a_body_is_read_in_pieces_and_not_beyond_its_end(app: Any, sqlite: Place) -> None:
    """PEP 3333 leaves open what a server returns after the Content-Length."""
    first = order(app, CONTENT_LENGTH="3", source=Slow(b"tea", ends=False))
    again = order(app, CONTENT_LENGTH="3", source=Slow(b"tea", ends=False))

    assert not first.is_replayed
    assert again.is_replayed
    assert sqlite.notes() == ["tea"]


def test_a_request_without_a_body_is_not_read(app: Any, sqlite: Place) -> None:
    """Neither Content-Length nor an end of the input: there is nothing."""
    for length in ("", "0"):
        source = Slow(b"next request", ends=False)
        order(app, key=f"key {length}", CONTENT_LENGTH=length, source=source)

    assert sqlite.notes() == ["", ""]


def chunked(body: bytes) -> dict[str, Any]:
    return {
        "wsgi.input": Slow(body, ends=True),
        "wsgi.input_terminated": True,
        "CONTENT_LENGTH": "",
        "HTTP_TRANSFER_ENCODING": "chunked",
    }


def test_a_chunked_body_is_read_where_the_server_ends_it(
    registry: scoped_session[Session],
) -> None:
    """gunicorn, cheroot, mod_wsgi and others say so in the environ."""
    bodies: list[bytes] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        bodies.append(environ["wsgi.input"].read())
        start_response("204 No Content", [])
        return []

    protected = protect(app, registry, max_body=6)
    assert order(protected, **chunked(b"coffee")).status == "204 No Content"
    assert order(protected, **chunked(b"coffee")).is_replayed
    assert order(protected, **chunked(b"cocoas")).code == "key_reused"
    assert order(protected, **chunked(b"coffees"), key="2").code == "body_too_large"
    assert bodies == [b"coffee"]


@pytest.mark.parametrize(
    ("more", "status", "code"),
    [
        pytest.param(
            {"CONTENT_LENGTH": "5"}, "413 Content Too Large", "body_too_large", id="too long"
        ),
        pytest.param(
            {"CONTENT_LENGTH": "4"}, "400 Bad Request", "body_incomplete", id="cut by the client"
        ),
        pytest.param(
            {"CONTENT_LENGTH": "3 "}, "400 Bad Request", "length_invalid", id="not a number"
        ),
        pytest.param({"CONTENT_LENGTH": "-3"}, "400 Bad Request", "length_invalid", id="negative"),
        pytest.param(
            {"CONTENT_LENGTH": "\u0663"}, "400 Bad Request", "length_invalid", id="other digits"
        ),
        pytest.param(
            {"CONTENT_LENGTH": "3" * 5000}, "400 Bad Request", "length_invalid", id="endless"
        ),
        pytest.param(
            {"CONTENT_LENGTH": "", "HTTP_TRANSFER_ENCODING": "chunked"},
            "411 Length Required",
            "length_required",
            id="chunked, on a server that does not end it",
        ),
    ],
)
def test_a_body_without_a_fingerprint_is_refused(
    more: dict[str, Any], status: str, code: str, shop: Shop, sqlite: Place
) -> None:
    """The application is not called with half of a body."""
    app = protect(shop, shop.registry, max_body=4)
    reply = order(app, **more, source=io.BytesIO(b"tea"))
    if code == "body_too_large":
        reply = order(app, **more, source=io.BytesIO(b"coffee"))

    assert (reply.status, reply.code) == (status, code)
    assert shop.calls == 0
    assert sqlite.keys() == []


def test_a_length_may_be_a_number(shop: Shop) -> None:
    """PEP 3333 asks for a string, but a test client may set what it has counted."""
    app = protect(shop, shop.registry)
    length: Any = 3

    assert order(app, CONTENT_LENGTH=length).status == "201 Created"
    assert order(app).is_replayed


def test_a_body_that_is_too_long_is_not_read_to_its_end(shop: Shop) -> None:
    """Memory for it is what ``max_body`` says."""
    source = io.BytesIO(b"x" * 1000)

    reply = order(protect(shop, shop.registry, max_body=10), source=source, CONTENT_LENGTH="1000")

    assert reply.code == "body_too_large"
    assert source.tell() == 11


def test_the_longest_body_is_accepted(shop: Shop, sqlite: Place) -> None:
    """``max_body`` is the number of bytes that are allowed."""
    order(protect(shop, shop.registry, max_body=3))

    assert sqlite.notes() == ["tea"]


# -- nesting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("copy", [False, True], ids=["the same environ", "a copy of it"])
def test_the_outermost_one_handles_a_nested_request(copy: bool, postgres: Place) -> None:
    """An application with the middleware, mounted in one with it, does not wait for itself."""
    registry = postgres.registry()
    inner = Shop(registry)
    mounted = Idempotency(inner, registry, KEYS, principal=user_of)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if not copy:
            return mounted(environ, start_response)
        return SessionMiddleware(mounted, registry)(environ.copy(), start_response)

    protected = protect(app, registry)
    order(protected)

    assert order(protected).is_replayed
    assert inner.calls == 1
    assert postgres.notes() == ["tea"]


def test_without_a_scope_the_error_says_what_is_missing(shop: Shop) -> None:
    """The middleware needs SessionMiddleware around it."""
    app = Idempotency(shop, shop.registry, KEYS, principal=user_of)

    with pytest.raises(RuntimeError, match="SessionMiddleware"):
        order(app)


def test_the_body_is_read_before_a_connection_is_taken(
    registry: scoped_session[Session], sqlite: Place
) -> None:
    """A client that sends slowly holds none."""
    checked_out: list[int] = []

    class Input(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            pool: Any = sqlite.engines[0].pool
            checked_out.append(pool.checkedout())
            return super().read(size)

    order(protect(Shop(registry), registry), CONTENT_LENGTH="3", source=Input(b"tea"))

    assert checked_out == [0]


def test_a_replay_runs_no_hooks(registry: scoped_session[Session]) -> None:
    """The mail is not sent again."""
    mails: list[str] = []

    def work(text: str) -> None:
        current_scope().on_commit(lambda: mails.append(text))

    app = protect(Shop(registry, work), registry)
    order(app)
    order(app)

    assert mails == ["tea"]


def test_a_request_that_only_reads_writes_its_key(sqlite: Place) -> None:
    """``session_class(when=...)`` routes it to an engine that cannot, but for the key."""
    engine = sqlite.engine()
    routed = session_class(engine, read_only_engine(engine), when=lambda environ: True)
    registry = scoped_session(sessionmaker(class_=routed), scopefunc=current_scope)
    shop = Shop(registry)

    assert order(protect(shop, registry)).status == "201 Created"
    assert order(protect(shop, registry)).is_replayed
    assert shop.calls == 1
