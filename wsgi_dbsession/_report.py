"""Words for log lines and errors: the client's text escaped, a note on an exception."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

log = logging.getLogger("wsgi_dbsession")


def describe(environ: WSGIEnvironment) -> str:
    """Return method and path of a request, for a log line."""
    return f"{_printable(str(environ.get('REQUEST_METHOD', '?')))} {describe_path(environ)}"


def describe_path(environ: WSGIEnvironment) -> str:
    """Return the path of a request as the client wrote it, control characters escaped."""
    path = str(environ.get("SCRIPT_NAME", "")) + str(environ.get("PATH_INFO", ""))
    # PEP 3333, "Unicode Issues": each character of such a str stands for a byte.
    return _printable(path.encode("latin-1", "replace").decode("utf-8", "backslashreplace"))


def _printable(text: str) -> str:
    # It comes from the client, who could forge lines of the log.
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def add_note(error: BaseException, note: str) -> None:
    """Add a note to an exception, as ``BaseException.add_note()`` does from Python 3.11 on."""
    error.__notes__ = [*getattr(error, "__notes__", ()), note]  # type: ignore[attr-defined]
