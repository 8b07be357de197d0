"""Answer a repeated request with the stored response."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from wsgi_dbsession._start import body_length

from ._problem import Problem

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse

    from ._rows import Found


def replay(row: Found, fingerprint: str, start_response: StartResponse) -> list[bytes]:
    """Respond with the stored response.

    :raises Problem: if none is stored, or the key was used for another request.
    """
    if row.fingerprint != fingerprint:
        raise Problem(
            "422 Unprocessable Content",
            "key_reused",
            "This Idempotency-Key was used for a request with another method, path, query or "
            "body. Use a new key for a new request.",
        )
    if row.status is None or row.headers is None:
        raise Problem(
            "409 Conflict",
            "unfinished",
            "The first request with this Idempotency-Key is still running or has failed, and a "
            "part of its changes was committed. Find out what is missing and request that with a "
            "new key.",
        )
    if row.body is None:
        raise Problem(
            "409 Conflict",
            "not_stored",
            "The first request with this Idempotency-Key took effect and was answered with "
            f"{row.status}, but its response was not stored. Do not repeat it.",
        )
    headers: list[tuple[str, str]] = [(name, value) for name, value in json.loads(row.headers)]
    if body_length(False, row.status, []):  # otherwise the status does not allow a body
        headers.append(("Content-Length", str(len(row.body))))
    headers.append(("Idempotent-Replayed", "true"))
    start_response(row.status, headers)
    return [row.body]
