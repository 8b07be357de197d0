"""The middleware's own responses, which are problem details: RFC 9457."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import OptExcInfo
    from _typeshed.wsgi import StartResponse


class Problem(Exception):  # noqa: N818 - it never leaves this package
    """Raised to answer a request with problem details instead of calling the application.

    :param status: the status line.
    :param code: the extension member ``code``, for programs.
    :param detail: the member ``detail``, for people: what is wrong, and then how to fix it.
    :param headers: further headers of the response.
    """

    def __init__(
        self, status: str, code: str, detail: str, headers: tuple[tuple[str, str], ...] = ()
    ) -> None:
        super().__init__(f"{status}: {detail}")
        self.status = status
        self.code = code
        self.detail = detail
        self.headers = headers

    def respond(
        self, start_response: StartResponse, exc_info: OptExcInfo | None = None
    ) -> list[bytes]:
        """Respond with the problem details.

        :param exc_info: given if the application has already called ``start_response``.
        """
        number, _, title = self.status.partition(" ")
        members = {
            "title": title,
            "status": int(number),
            "detail": self.detail,
            "code": self.code,
        }
        body = json.dumps(members).encode()
        headers = [
            ("Content-Type", "application/problem+json"),
            ("Content-Length", str(len(body))),
            *self.headers,
        ]
        if exc_info is None:
            start_response(self.status, headers)
        else:
            start_response(self.status, headers, exc_info)
        return [body]


def in_progress() -> Problem:
    """Return the response to a request whose key another request is using."""
    return Problem(
        "409 Conflict",
        "in_progress",
        "A request with this Idempotency-Key is being handled. Repeat it later with the same key.",
        (("Retry-After", "1"),),
    )
