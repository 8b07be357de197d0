"""What identifies a request: its key, its principal, its fingerprint."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

from ._problem import Problem

if TYPE_CHECKING:
    from _typeshed.wsgi import InputStream, WSGIEnvironment

MAX_KEY = 255

# Printable ASCII without the comma, with which servers join the values of a repeated header.
_PLAIN = re.compile("[ -+\\--~]+")
# The string of RFC 8941, section 3.3.3.
_QUOTED = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\])*)"')


def read_key(header: str) -> str:
    """Return the key in the header, a bare one or a string of a structured field.

    :raises Problem: if the header is malformed.
    """
    value = header.strip(" \t")
    if value.startswith('"'):
        match = _QUOTED.fullmatch(value)
        key = re.sub(r"\\(.)", r"\1", match[1]) if match else ""
    else:
        key = value if _PLAIN.fullmatch(value) else ""
    if not 0 < len(key) <= MAX_KEY:
        raise Problem(
            "400 Bad Request",
            "key_invalid",
            f"The Idempotency-Key must be a string of 1 to {MAX_KEY} printable ASCII characters, "
            "sent once. Put it into double quotes if it contains a comma.",
        )
    return key


def read_body(environ: WSGIEnvironment, max_body: int) -> bytes:
    """Read the request's body.

    :raises Problem: if it is longer than ``max_body``, incomplete, or of unknown length.
    """
    source: InputStream = environ["wsgi.input"]
    text = str(environ.get("CONTENT_LENGTH") or "")  # a test client may set a number
    if environ.get("wsgi.input_terminated") and not text:
        body = _read(source, max_body + 1)
    elif environ.get("HTTP_TRANSFER_ENCODING") and not text:
        raise Problem(
            "411 Length Required",
            "length_required",
            "This server cannot read a chunked body with an Idempotency-Key. "
            "Send a Content-Length.",
        )
    elif not re.fullmatch("[0-9]{0,19}", text):
        raise Problem("400 Bad Request", "length_invalid", "The Content-Length is not a number.")
    else:
        length = int(text or 0)
        # One byte more than allowed shows that the body is too long.
        body = _read(source, min(length, max_body + 1))
        if len(body) < min(length, max_body + 1):
            raise Problem(
                "400 Bad Request",
                "body_incomplete",
                "The body is shorter than its Content-Length. Repeat the request.",
            )
    if len(body) > max_body:
        raise Problem(
            "413 Content Too Large",
            "body_too_large",
            f"The body of a request with an Idempotency-Key must have at most {max_body} bytes.",
        )
    return body


def _read(source: InputStream, size: int) -> bytes:
    """Read up to `size` bytes: a single read() of a server may return fewer."""
    blocks: list[bytes] = []
    while size > 0 and (block := source.read(size)):
        blocks.append(block)
        size -= len(block)
    return b"".join(blocks)


def identify(principal: str | None, key: str) -> str:
    """Return the row's primary key."""
    return _digest(_encode(principal or ""), _encode(key))


def fingerprint(environ: WSGIEnvironment, body: bytes) -> str:
    """Return a digest of method, path, query and body."""
    path = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
    texts = (environ["REQUEST_METHOD"], path, environ.get("QUERY_STRING", ""))
    return _digest(*map(_encode, texts), body)


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _digest(*parts: bytes) -> str:
    whole = hashlib.sha256()
    for part in parts:
        # The length separates the parts: "ab", "c" and "a", "bc" must differ.
        whole.update(b"%d:" % len(part))
        whole.update(part)
    return whole.hexdigest()
