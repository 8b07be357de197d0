"""The board: an HTML page around a WSGI application, and its data as JSON."""

from __future__ import annotations

import ipaddress
import json
from dataclasses import asdict, is_dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from wsgi_dbsession._report import log

from ._page import PAGE, POLICY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

# How the headers that proxies add begin.
_FORWARDED = ("HTTP_FORWARDED", "HTTP_VIA", "HTTP_X_FORWARDED", "HTTP_X_REAL_IP")
_HEADERS = [
    ("Cache-Control", "no-store"),
    ("Content-Security-Policy", POLICY),
    ("Referrer-Policy", "no-referrer"),
    ("Vary", "Accept"),
    ("X-Content-Type-Options", "nosniff"),
]
_JSON = "application/json"


def allow_loopback(environ: WSGIEnvironment) -> bool:
    """Return whether a request comes from this machine and did not pass through a proxy.

    Behind a proxy on the same machine, every client has a local address. So a request with a
    proxy's header is refused, and so is one whose ``Host`` is not this machine. The latter
    also prevents DNS rebinding.

    A proxy that adds no header and replaces ``Host`` looks like a local client: do not let it
    serve the board's path. waitress removes the headers of proxies, so each request that it
    serves is refused.

    :param environ: the request's environ.
    """
    return (
        not any(name.startswith(_FORWARDED) for name in environ)
        and not _is_served_by_waitress(environ)
        and _is_loopback(str(environ.get("REMOTE_ADDR", "")))
        and _is_loopback(_host(str(environ.get("HTTP_HOST", ""))))
    )


def _is_served_by_waitress(environ: WSGIEnvironment) -> bool:
    # SERVER_SOFTWARE is the setting `ident`. The key has existed since waitress 2.0.
    return (
        environ.get("SERVER_SOFTWARE") == "waitress" or "waitress.client_disconnected" in environ
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)  # ::ffff:127.0.0.1
    return (mapped or address).is_loopback


def _host(header: str) -> str:
    name, bracket, _ = header.lower().removeprefix("[").partition("]")
    return name if bracket else header.lower().partition(":")[0]


class Board:
    """A page around an application, see :meth:`Watch.board`.

    :param app: the application.
    :param path: the path of the page.
    :param allow: called with the environ, returns whether to answer.
    :param report: returns the data of the page.
    """

    def __init__(
        self,
        app: WSGIApplication,
        path: str,
        allow: Callable[[WSGIEnvironment], bool],
        report: Callable[[], dict[str, Any]],
    ) -> None:
        for name, value in (("app", app), ("allow", allow)):
            if not callable(value):
                msg = f"{name} must be callable, got {value!r}"
                raise TypeError(msg)
        if not path.startswith("/"):
            msg = f"path must begin with a slash, got {path!r}"
            raise ValueError(msg)
        self.app = app
        self._path = path
        self._allow = allow
        self._report = report
        self._warned = False

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request for the page; pass others to the application."""
        if environ.get("PATH_INFO") != self._path:
            return self.app(environ, start_response)
        status, kind, body = self._answer(environ)
        headers = [("Content-Type", kind), ("Content-Length", str(len(body))), *_HEADERS]
        if status.startswith("405"):
            headers.append(("Allow", "GET, HEAD"))
        start_response(status, headers)
        return [b"" if environ.get("REQUEST_METHOD") == "HEAD" else body]

    def _answer(self, environ: WSGIEnvironment) -> tuple[str, str, bytes]:
        text = "text/plain; charset=utf-8"
        if not self._allow(environ):
            self._explain(environ)
            return "404 Not Found", text, b"Not Found\n"
        if environ.get("REQUEST_METHOD") not in ("GET", "HEAD"):
            return "405 Method Not Allowed", text, b"Method Not Allowed\n"
        if wants_json(str(environ.get("HTTP_ACCEPT", ""))):
            return "200 OK", _JSON, json.dumps(self._report(), default=_plain).encode()
        return "200 OK", "text/html; charset=utf-8", PAGE

    def _explain(self, environ: WSGIEnvironment) -> None:
        if self._allow is allow_loopback and _is_served_by_waitress(environ) and not self._warned:
            self._warned = True
            log.warning(
                "refusing the board at %s: waitress removes the headers by which a proxy is "
                "recognized. Pass allow= to Watch.board()",
                self._path,
            )


def wants_json(accept: str) -> bool:
    """Return whether a client prefers JSON to HTML, see "Accept" in RFC 9110."""
    return _quality(accept, _JSON) > _quality(accept, "text/html")


def _quality(accept: str, kind: str) -> tuple[float, int]:
    """Return the quality of a media type, and the precision of the range that matches it."""
    ranges = (kind, f"{kind.partition('/')[0]}/*", "*/*")
    best = (-len(ranges), 0.0)
    for part in accept.lower().split(","):
        name, *parameters = (each.strip() for each in part.split(";"))
        if name in ranges:
            quality = 1.0
            for parameter in parameters:
                if parameter.startswith("q="):
                    try:
                        quality = float(parameter[2:])
                    except ValueError:
                        quality = 0.0
            best = max(best, (-ranges.index(name), quality))
    precision, quality = best
    return (quality, precision) if quality else (0.0, 0)


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.isoformat()
    assert is_dataclass(value)
    assert not isinstance(value, type)
    return asdict(value)
