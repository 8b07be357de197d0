"""Each attempt reads the whole body of the request."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from typing import TYPE_CHECKING, Any
from wsgiref.validate import validator

import bottle
import falcon
import flask
import pytest
from django.core.handlers.wsgi import LimitedStream
from django.test.client import FakePayload
from pyramid.request import Request as PyramidRequest

from tests.retry.applications import SIZED, Restless, list_app, protect
from tests.support.wsgi import Server, drive, make_environ
from wsgi_dbsession.retry import Retry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from sqlalchemy.orm import Session, scoped_session

pytestmark = pytest.mark.promise("attempts")


class Socket(io.BytesIO):
    """A body that says how much of it was read."""

    @property
    def left(self) -> int:
        return len(self.getvalue()) - self.tell()


def over(source: io.BytesIO) -> dict[str, Any]:
    return {"wsgi.input": source}


def _read_all(stream: Any) -> list[bytes]:
    return [stream.read()]


def _read_by_number(stream: Any) -> list[bytes]:
    return [stream.read(10_000_000)]


def _read_minus_one(stream: Any) -> list[bytes]:
    return [stream.read(-1)]


def _read_none(stream: Any) -> list[bytes]:
    return [stream.read(None)]


def _read_in_bits(stream: Any) -> list[bytes]:
    return list(iter(lambda: stream.read(7), b""))


def _read_lines(stream: Any) -> list[bytes]:
    return list(iter(stream.readline, b""))


def _read_bits_of_lines(stream: Any) -> list[bytes]:
    return list(iter(lambda: stream.readline(5), b""))


def _iterate(stream: Any) -> list[bytes]:
    return list(stream)


def _read_list(stream: Any) -> list[bytes]:
    lines: list[bytes] = stream.readlines()
    return lines


def _read_list_with_hint(stream: Any) -> list[bytes]:
    first: list[bytes] = stream.readlines(20)
    rest: list[bytes] = stream.readlines(None)
    return first + rest


READERS = {
    "read()": _read_all,
    "read(n)": _read_by_number,
    "read(-1)": _read_minus_one,
    "read(None)": _read_none,
    "read(7) to the end": _read_in_bits,
    "readline()": _read_lines,
    "readline(5)": _read_bits_of_lines,
    "iteration": _iterate,
    "readlines()": _read_list,
    "readlines(20)": _read_list_with_hint,
}
BODY = b"".join(b"line %d of the body\n" % number for number in range(20)) + b"no newline"


@pytest.mark.parametrize("second", READERS)
@pytest.mark.parametrize("first", READERS)
def test_each_attempt_reads_the_whole_body(
    first: str, second: str, plain: scoped_session[Session]
) -> None:
    """However an attempt reads, the next one begins at the first byte, and gets the same."""
    seen: list[list[bytes]] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        reader = READERS[first if len(seen) == 0 else second]
        seen.append(reader(environ["wsgi.input"]))
        if len(seen) < 3:
            raise Retry
        start_response("200 OK", SIZED)
        return [b"done"]

    assert drive(protect(app, plain), "POST", BODY).body == b"done"

    assert seen[0] == READERS[first](io.BytesIO(BODY))
    assert seen[1] == seen[2] == READERS[second](io.BytesIO(BODY))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("part", [0, 5, 25])
def test_a_body_that_was_read_in_part_is_replayed_and_read_on(
    part: int, reader: str, plain: scoped_session[Session]
) -> None:
    """Nothing is read ahead: what the first attempt left is still on the server's side."""
    source = Socket(BODY)
    left: list[int] = []
    seen: list[list[bytes]] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        stream = environ["wsgi.input"]
        left.append(source.left)
        if len(left) == 1:
            assert stream.read(part) == BODY[:part]
            assert stream.readline(0) == b""
            raise Retry
        seen.append(READERS[reader](stream))
        start_response("200 OK", SIZED)
        return [b"done"]

    more: dict[str, Any] = {"wsgi.input": source, "CONTENT_LENGTH": str(len(BODY))}
    assert drive(protect(app, plain), "POST", **more).body == b"done"

    assert left == [len(BODY), len(BODY) - part]
    assert seen == [READERS[reader](io.BytesIO(BODY))]


def test_an_unread_body_stays_where_it_is(plain: scoped_session[Session]) -> None:
    """The server can go on with it as it likes."""
    source = Socket(BODY)

    with pytest.raises(Retry):
        drive(protect(list_app(Restless()), plain), "POST", **over(source))

    assert source.left == len(BODY)


def test_the_end_of_a_body_is_asked_for_once(plain: scoped_session[Session]) -> None:
    """On some servers, reading beyond the end would wait for the next request."""

    class Once(io.BytesIO):
        ends = 0

        def read(self, size: int | None = -1, /) -> bytes:
            block = super().read(size)
            self.ends += not block
            assert self.ends < 2
            return block

    seen: list[bytes] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        stream = environ["wsgi.input"]
        seen.append(b"".join(iter(lambda: stream.read(100), b"")))
        raise Retry

    with pytest.raises(Retry):
        drive(protect(app, plain), "POST", **over(Once(BODY)))
    assert seen == [BODY] * 3


@pytest.mark.parametrize("length", ["declared", "not declared", "not a number"])
@pytest.mark.parametrize("size", [1000, 1001, 1300])
def test_a_body_larger_than_the_bound_is_not_kept(
    size: int, length: str, plain: scoped_session[Session], caplog: pytest.LogCaptureFixture
) -> None:
    """The request is run once then, and the log says why; up to the bound it is run again."""
    caplog.set_level(logging.INFO)
    seen: list[bytes] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        stream = environ["wsgi.input"]
        seen.append(b"".join(iter(lambda: stream.read(100), b"")))
        raise Retry

    body = b"x" * size
    more: dict[str, Any] = {"wsgi.input": io.BytesIO(body)}
    if length == "declared":
        more["CONTENT_LENGTH"] = str(size)
    elif length == "not a number":
        more["CONTENT_LENGTH"] = "many"
    with pytest.raises(Retry):
        drive(protect(app, plain, max_body=1000), "POST", **more)

    assert seen == [body] * (3 if size == 1000 else 1)
    if size > 1000:
        attempts = 1 if length == "declared" else 3
        (message,) = caplog.messages
        assert message == (
            f"not retrying POST /path: attempt 1 of {attempts} failed with Retry, "
            "but its body is longer than max_body"
        )


def test_a_large_body_that_is_not_read_may_run_again(plain: scoped_session[Session]) -> None:
    """Without a declared length, it is what was read that counts."""
    work = Restless()

    with pytest.raises(Retry):
        drive(
            protect(list_app(work), plain, max_body=10),
            "POST",
            HTTP_TRANSFER_ENCODING="chunked",
            **over(io.BytesIO(BODY)),
        )
    assert work.attempts == 3


def test_a_body_is_kept_on_disk_beyond_some_size(plain: scoped_session[Session]) -> None:
    """A body of half a megabyte comes back as it was, and leaves no file open."""
    body = bytes(range(256)) * 2048
    seen: list[bytes] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        stream = environ["wsgi.input"]
        seen.append(b"".join(iter(lambda: stream.read(50_000 * (len(seen) + 1)), b"")))
        if len(seen) < 3:
            raise Retry
        start_response("200 OK", SIZED)
        return [b"done"]

    assert drive(protect(app, plain), "POST", body).body == b"done"
    assert seen == [body] * 3


def test_a_body_larger_than_the_bound_takes_no_place_on_disk(
    plain: scoped_session[Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was kept of it is given up at once, and the rest is not kept."""
    files: list[Any] = []
    make = tempfile.TemporaryFile

    def make_file(**options: Any) -> Any:
        files.append(make(**options))
        return files[-1]

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        for _ in iter(lambda: environ["wsgi.input"].read(50_000), b""):
            pass
        assert [file.closed for file in files] == [True]
        start_response("200 OK", SIZED)
        return [b"done"]

    monkeypatch.setattr(tempfile, "TemporaryFile", make_file)
    drive(protect(app, plain, max_body=100_000), "POST", bytes(300_000), CONTENT_LENGTH="")


class Strict:
    """A stream that refuses what PEP 3333 does not ask for: as the reference validator's does."""

    def __init__(self, body: bytes) -> None:
        self._body = io.BytesIO(body)

    def read(self, size: int, /) -> bytes:
        """Refuse to read without a size."""
        assert size >= -1
        return self._body.read(size)

    def readline(self, *size: int) -> bytes:
        return self._body.readline(*size)


@pytest.mark.parametrize("second", ["read(n)", "read(-1)", "read(7) to the end", "readline()"])
@pytest.mark.parametrize("first", ["read(n)", "read(-1)", "read(7) to the end", "readline()"])
def test_the_servers_stream_is_read_as_the_application_reads(
    first: str, second: str, plain: scoped_session[Session]
) -> None:
    """A stream that needs a size gets one, whatever an earlier attempt has read."""
    seen: list[bytes] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        stream = environ["wsgi.input"]
        if not seen:
            assert stream.read(30) == BODY[:30]
        seen.append(b"".join(READERS[second if seen else first](stream)))
        if len(seen) < 3:
            raise Retry
        start_response("200 OK", SIZED)
        return [b"done"]

    more: dict[str, Any] = {"wsgi.input": Strict(BODY)}
    assert drive(protect(app, plain), "POST", **more).body == b"done"
    assert seen == [BODY[30:], BODY, BODY]


@pytest.mark.parametrize("inside", [True, False], ids=["validator inside", "only outside"])
@pytest.mark.parametrize(
    "reader",
    ["read(n)", "read(-1)", "read(7) to the end", *(name for name in READERS if "line" in name)],
)
def test_the_reference_validator_has_no_objection_to_the_body(
    reader: str, inside: bool, plain: scoped_session[Session]
) -> None:
    """It wraps the stream of the server, and that of each attempt."""
    seen: list[list[bytes]] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        seen.append(READERS[reader](environ["wsgi.input"]))
        if len(seen) < 3:
            raise Retry
        start_response("200 OK", SIZED)
        return [b"done"]

    protected = protect(validator(app) if inside else app, plain)

    assert drive(validator(protected), "POST", BODY).body == b"done"
    assert seen == [READERS[reader](io.BytesIO(BODY))] * 3


@pytest.mark.parametrize("length", [5, "5", "", None, "many", "-1"], ids=repr)
def test_the_length_of_the_body_may_be_anything(
    length: Any, plain: scoped_session[Session]
) -> None:
    """Django's test client gives an int, some servers an empty string."""
    work = Restless()

    with pytest.raises(Retry):
        drive(protect(list_app(work), plain), "POST", CONTENT_LENGTH=length)
    assert work.attempts == 3
    work = Restless()
    with pytest.raises(Retry):
        drive(protect(list_app(work), plain, max_body=4), "POST", CONTENT_LENGTH=length)
    assert work.attempts == (1 if length in (5, "5") else 3)


def test_a_request_without_a_body_is_run_again(plain: scoped_session[Session]) -> None:
    """Against PEP 3333, but the tests of applications make such environs."""
    seen: list[bool] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        seen.append("wsgi.input" in environ)
        raise Retry

    environ = make_environ()
    del environ["wsgi.input"]
    with pytest.raises(Retry):
        protect(app, plain)(environ, Server().start_response)
    assert seen == [False] * 3


def test_the_stream_of_djangos_test_client_is_read_within_its_length(
    plain: scoped_session[Session],
) -> None:
    """It fails where more is asked for than there is."""
    seen: list[bytes] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        stream = LimitedStream(environ["wsgi.input"], environ["CONTENT_LENGTH"])
        seen.append(stream.read())
        if len(seen) < 3:
            raise Retry
        start_response("200 OK", SIZED)
        return [b"done"]

    more: dict[str, Any] = {"wsgi.input": FakePayload(BODY), "CONTENT_LENGTH": len(BODY)}
    assert drive(protect(app, plain), "POST", **more).body == b"done"
    assert seen == [BODY] * 3


def boundary_body(content: bytes) -> tuple[bytes, str]:
    head = (
        b'--BOUND\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n'
        b"Content-Type: text/plain\r\n\r\n"
    )
    body = head + content + b"\r\n--BOUND--\r\n"
    return body, "multipart/form-data; boundary=BOUND"


def _form_of_flask(environ: WSGIEnvironment) -> object:
    request = flask.Request(environ)
    if request.mimetype == "application/json":
        return request.get_json()
    if "file" not in request.files:
        return request.form["text"]
    with contextlib.closing(request.files["file"]) as upload:
        return upload.read().decode()


def _form_of_bottle(environ: WSGIEnvironment) -> object:
    request = bottle.BaseRequest(environ)
    if "json" in environ["CONTENT_TYPE"]:
        return request.json
    if "multipart" not in environ["CONTENT_TYPE"]:
        return request.forms.get("text")
    with contextlib.closing(request.body), request.files["file"].file as upload:
        return upload.read().decode()


def _form_of_pyramid(environ: WSGIEnvironment) -> object:
    request = PyramidRequest(environ)
    if "json" in environ["CONTENT_TYPE"]:
        return request.json_body
    if "multipart" not in environ["CONTENT_TYPE"]:
        return request.POST["text"]
    # It reads into a file of its own.
    with request.POST["file"].file as upload, contextlib.closing(environ["wsgi.input"]):
        return upload.read().decode()


def _form_of_falcon(environ: WSGIEnvironment) -> object:
    request = falcon.Request(environ)
    if "multipart" in environ["CONTENT_TYPE"]:
        (text,) = [part.stream.read().decode() for part in request.get_media()]
        return text
    media = request.get_media()
    return media.get("text") if isinstance(media, dict) else media


@pytest.mark.parametrize("body", ["form", "JSON", "upload"])
@pytest.mark.parametrize(
    "parse",
    [_form_of_flask, _form_of_bottle, _form_of_pyramid, _form_of_falcon],
    ids=["Flask", "Bottle", "Pyramid", "Falcon"],
)
def test_forms_and_uploads_are_parsed_in_each_attempt(
    parse: Callable[[WSGIEnvironment], object], body: str, plain: scoped_session[Session]
) -> None:
    """The framework's own parser sees what the client sent, each time."""
    content, kind = {
        "form": (b"text=hello", "application/x-www-form-urlencoded"),
        "JSON": (b'["hello"]', "application/json"),
        "upload": boundary_body(b"hello" * 50_000),
    }[body]
    expected = {"form": "hello", "JSON": ["hello"], "upload": "hello" * 50_000}[body]
    seen: list[object] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        seen.append(parse(environ))
        if len(seen) < 3:
            raise Retry
        start_response("200 OK", SIZED)
        return [b"done"]

    assert drive(protect(app, plain), "POST", content, CONTENT_TYPE=kind).body == b"done"
    assert seen == [expected] * 3
