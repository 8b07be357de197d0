"""The middleware: it checks its arguments and its place, and observes the core."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wsgi_dbsession._middleware import SessionMiddleware
from wsgi_dbsession._scope import find_scope

from ._attempt import KEY
from ._listeners import listen
from ._observer import OBSERVER
from ._policy import Policy, check_not_negative
from ._request import Request

if TYPE_CHECKING:
    from collections.abc import Iterable

    from _typeshed.wsgi import StartResponse, WSGIEnvironment

    from ._policy import On


class RetryMiddleware:
    """Run a request again if its transaction lost a race.

    ::

        app.wsgi_app = RetryMiddleware(SessionMiddleware(app.wsgi_app, Session))

    A request is retried if it raised a retryable error, see :func:`is_retryable`. It is also
    retried if it answered with status 4xx or 5xx and the last database error was retryable. It is
    never retried if a block of the response was sent, if anything was or may have been committed
    in it, or if the connection was lost during COMMIT.

    Each attempt reads the body from its first byte and gets a copy of the environ as it was
    before the first attempt. ``environ["wsgi_dbsession.attempt"]`` counts the attempts from 1, and
    ``environ["wsgi_dbsession.attempts"]`` is the number of the last one. Hooks of
    :meth:`Scope.on_commit` run for the attempt that is committed, and those of
    :meth:`Scope.on_rollback` for each attempt that is rolled back.

    :param app: the :class:`SessionMiddleware`. Put other middleware around both, or inside both.
    :param attempts: the largest number of attempts, the first one included.
    :param max_body: a request with a longer body, in bytes, is not retried.
    :param backoff: the limit, in seconds, of the random delay before the second attempt. It
        doubles with each further attempt.
    :param backoff_max: the largest limit of that delay.
    :param timeout: no attempt begins later than this many seconds after the first.
    :param on: further errors to retry: an exception class, a tuple of them, or a callable that
        gets an ``Exception`` and returns whether to retry it. You promise that nothing was
        committed with such an error.
    :param retry_connect: whether to retry if no connection to the database could be made.
    :raises TypeError: ``app`` is not a :class:`SessionMiddleware`, or ``on`` is neither exception
        classes nor callable.
    :raises ValueError: a number is too small.
    """

    def __init__(
        self,
        app: SessionMiddleware,
        *,
        attempts: int = 3,
        max_body: int = 1 << 20,
        backoff: float = 0.05,
        backoff_max: float = 1.0,
        timeout: float = 10.0,
        on: On = (),
        retry_connect: bool = False,
    ) -> None:
        kind: type = type(app)  # callers without a type checker may pass anything
        if not issubclass(kind, SessionMiddleware):
            msg = (
                f"app must be a SessionMiddleware, got {app!r}. Write "
                "RetryMiddleware(SessionMiddleware(app, Session)), with other middleware around "
                "both or inside of both"
            )
            raise TypeError(msg)
        check_not_negative("max_body", max_body, "bytes")
        self.app = app
        self._max_body = max_body
        self._policy = Policy(
            attempts, backoff, backoff_max, timeout, (on,), retry_connect
        ).check()
        if OBSERVER not in app.observers:
            app.observers += (OBSERVER,)
        listen()

    def retry_on(self, on: On) -> None:
        """Retry further errors, for a middleware around this one that causes them.

        :param on: see :class:`RetryMiddleware`.
        :raises TypeError: ``on`` is neither exception classes nor callable.
        """
        self._policy = self._policy._replace(on=(*self._policy.on, on)).check()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Handle one request."""
        scope = find_scope()
        if scope is not None and scope.environ is environ:
            if KEY in environ:
                return self.app(environ, start_response)  # the outermost RetryMiddleware decides
            msg = (
                "RetryMiddleware is inside of a SessionMiddleware, so it cannot undo an attempt. "
                "Put it around the outermost one: "
                "RetryMiddleware(SessionMiddleware(app, Session))"
            )
            raise RuntimeError(msg)
        request = Request(self._policy, self.app, environ, start_response, self._max_body)
        return request.respond()
