"""The attempts at one request, and the response of the final one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wsgi_dbsession._report import describe, describe_path, log
from wsgi_dbsession._start import END, HeldStart, close

from ._attempt import KEY, Attempt
from ._body import Body
from ._policy import Run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from _typeshed import OptExcInfo
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    from wsgi_dbsession._scope import Scope

    from ._policy import Policy

_SCOPE = "wsgi_dbsession.scope"


class _Start(HeldStart):
    """The start of an attempt's response, held until the attempt is final."""

    __slots__ = ()

    def __init__(self, start_response: StartResponse) -> None:
        self.status = self._exc_info = None
        self.released = False
        self._server = start_response

    def __call__(
        self, status: str, headers: list[tuple[str, str]], exc_info: OptExcInfo | None = None, /
    ) -> Callable[[bytes], object]:
        if self.status is not None and exc_info is None:
            self.release()  # without a scope, the server refuses a second call
        self.status, self.headers, self._exc_info = status, headers, exc_info
        if self.released:
            # The server replaces a start that it has not sent yet, and otherwise raises.
            self._pass_on()
        return self._write_now

    def release(self) -> None:
        """Pass the start to the server, now or as soon as the application provides it."""
        if self.status is None:
            self.released = True
        elif not self.released:
            self._pass_on()

    def _write_now(self, block: bytes, /) -> None:
        self.release()
        self._write(block)


class _RequestAttempt(Attempt):
    """An attempt at a request."""

    __slots__ = ("opened", "request", "start")

    def __init__(self, request: Request, start_response: StartResponse) -> None:
        policy = request.policy
        super().__init__(policy.find, request.has_next, retry_connect=policy.retry_connect)
        self.request = request
        self.opened = False  # whether the request got a scope
        self.start = _Start(start_response)

    def obstacle(self) -> str | None:
        """Describe what forbids another attempt, or return None."""
        if self.start.released:
            return "a part of its response was sent"
        if self.request.has_lost_body():
            return "its body is longer than max_body"
        return super().obstacle()

    def needs_retry(self, error: Exception | None = None) -> bool:
        """Return whether another attempt follows this one, and log the decision.

        :param error: the exception that was raised, None if only the response shows the failure.
        """
        if not self.opened or (error is None and self._is_success()):
            return False
        return self.request.decide(self, error)

    def _is_success(self) -> bool:
        status = self.start.status
        # An error page is a success if its work was committed, for example by Scope.keep().
        return not self.failed_to_commit and (
            self.succeeded or status is None or status[:1] not in "45"
        )


class Request(Run):
    """The attempts at one request. They refer to it, and it does not refer to them: no cycle."""

    __slots__ = ("_app", "_body", "_environ", "_server")

    def __init__(
        self,
        policy: Policy,
        app: WSGIApplication,
        environ: WSGIEnvironment,
        start_response: StartResponse,
        max_body: int,
    ) -> None:
        super().__init__(policy)
        self._app = app
        self._environ = environ
        self._server = start_response
        self._body: Body | None = None
        source = environ.get("wsgi.input")  # missing in some tests of applications
        if _declared_length(environ) > max_body:
            self.attempts = 1
        elif source is not None:
            self._body = Body(source, max_body)

    def describe(self) -> str:
        """Return method and path, for log lines."""
        return describe(self._environ)

    def extra(self) -> dict[str, object]:
        """Return the fields of a log record, for machines."""
        environ = self._environ
        return {
            **super().extra(),
            "method": environ.get("REQUEST_METHOD"),
            "path": describe_path(environ),
        }

    def has_lost_body(self) -> bool:
        """Return whether another attempt could not read the whole body."""
        if self._body is None:
            return "wsgi.input" in self._environ
        return self._body.is_lost()

    def respond(self) -> Iterable[bytes]:
        """Run the application until an attempt is final, and return its response."""
        while True:
            self.number += 1
            attempt = _RequestAttempt(self, self._server)
            environ = self._prepare(attempt)
            result: Iterable[bytes] = ()
            blocks: Iterator[bytes] | None = None
            block = END
            try:
                try:
                    result = self._app(environ, attempt.start)
                finally:
                    scope = self._find_scope(environ)
                    attempt.opened = scope is not None
                if scope is not None and scope.environ is not None:
                    # The scope is open: the body may still fail before its first block.
                    blocks = iter(result)
                    block = next(blocks, END)
                if not attempt.needs_retry():
                    attempt.start.release()
                    if blocks is None:
                        return result
                    return _Response(attempt, result, block, blocks)
            except BaseException as error:
                _close_failed(result)
                if not isinstance(error, Exception) or not attempt.needs_retry(error):
                    raise
            else:
                _close_failed(result)
                if attempt.obstacle() is not None:
                    # Its close() has committed something, for example: this response is final.
                    attempt.start.release()
                    return [] if block is END else [block]
            if self._body is not None:
                self._body.rewind()
            self.pause()

    def _find_scope(self, environ: WSGIEnvironment) -> Scope | None:
        """Return the attempt's scope, or None if SessionMiddleware has skipped the request."""
        scope: Scope | None = environ.get(_SCOPE)
        # The environ of an inner request may contain the outer one's scope.
        return None if scope is self._environ.get(_SCOPE) else scope

    def _prepare(self, attempt: _RequestAttempt) -> WSGIEnvironment:
        """Return a copy of the original environ for an attempt."""
        environ = self._environ.copy()
        environ[KEY] = attempt
        attempt.environ = id(environ)
        environ["wsgi_dbsession.attempt"] = self.number
        environ["wsgi_dbsession.attempts"] = self.attempts
        if self._body is not None:
            environ["wsgi.input"] = self._body
        return environ


class _Response:
    """The body: the server iterates over it if application code is left to run."""

    __slots__ = ("_ahead", "_attempt", "_blocks", "_iterable")

    def __init__(
        self,
        attempt: _RequestAttempt,
        iterable: Iterable[bytes],
        ahead: bytes,
        blocks: Iterator[bytes],
    ) -> None:
        self._attempt = attempt
        self._iterable = iterable
        self._ahead: bytes | None = ahead
        self._blocks = blocks

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        block, self._ahead = self._ahead, None
        try:
            if block is None:
                block = next(self._blocks, END)
        except Exception as error:
            self._attempt.needs_retry(error)  # only to log why no attempt follows
            raise
        if block is END:
            raise StopIteration
        return block

    def close(self) -> None:
        close(self._iterable)


def _close_failed(iterable: Iterable[bytes]) -> None:
    try:
        close(iterable)
    except Exception:
        log.warning("ignoring an error in close() of a failed attempt", exc_info=True)


def _declared_length(environ: WSGIEnvironment) -> int:
    """Return CONTENT_LENGTH as a number, 0 if it is missing or malformed."""
    try:
        return int(environ.get("CONTENT_LENGTH") or 0)
    except (TypeError, ValueError):
        return 0
