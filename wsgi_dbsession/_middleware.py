"""The middleware: checks at construction, nesting, and the scope of each request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import scoped_session

from ._moment import MOMENTS, CommitOn, Policy, choose_moment
from ._registry import adopt, check_observers, observers_of
from ._response import respond
from ._scope import Observer, Scope, find_scope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    from ._moment import CommitVeto


def default_commit_veto(
    environ: WSGIEnvironment, status: str, headers: list[tuple[str, str]]
) -> bool:
    """Roll back on status 4xx and 5xx.

    Frameworks turn exceptions into such responses before a middleware can catch them. The
    signature is that of ``repoze.tm2``, so a veto of an existing application works.

    :param environ: the request's environ.
    :param status: the status line, such as ``"404 Not Found"``.
    :param headers: the response's headers, pairs of name and value.
    :return: whether to roll back.
    """
    return "4" <= status < "6"


class SessionMiddleware:
    """Give each request its own Sessions, and always close them with its response.

    ::

        Session = scoped_session(sessionmaker(engine), scopefunc=current_scope)
        app.wsgi_app = SessionMiddleware(app.wsgi_app, Session)

    :param app: the WSGI application.
    :param registries: the application's ``scoped_session`` objects, whose ``scopefunc`` must be
        :func:`current_scope`. All that a request uses share one outcome.
    :param commit_on: the moment of the outcome. ``"complete"``: as late as possible while a
        failure can still reach the client. ``"headers"``: always before the response's start;
        what a stream does after it runs in its own transaction. ``"close"``: when the
        response is closed, which is when the client has all of it already. ``"auto"``:
        ``"headers"`` for ``text/event-stream``, else ``"complete"``. Or a callable that is called
        with environ, status and headers, and returns one of the first three.
    :param commit_veto: called with environ, status and headers, returns whether to roll back;
        None commits on every status.
    :param commit_error: a WSGI application that answers, with status 4xx or 5xx, where the commit
        failed and nothing has been sent yet; ``sys.exc_info()`` has that error. It runs after the
        scope. With None the error propagates to the server.
    :param skip: called with environ, returns whether to pass the request through untouched.
    :param observers: see :class:`Observer`.
    :raises TypeError: a registry is not a ``scoped_session``, an argument is not callable, or an
        observer is not an :class:`Observer`.
    :raises ValueError: no registry was given, one has another ``scopefunc``, or ``commit_on`` is
        none of the above.
    """

    observers: tuple[Observer, ...]
    """The observers of each request; a middleware around this one may add its own."""

    def __init__(
        self,
        app: WSGIApplication,
        *registries: scoped_session[Any],
        commit_on: CommitOn = "complete",
        commit_veto: CommitVeto | None = default_commit_veto,
        commit_error: WSGIApplication | None = None,
        skip: Callable[[WSGIEnvironment], bool] | None = None,
        observers: Iterable[Observer] = (),
    ) -> None:
        given: Any = app  # callers without a type checker may pass anything
        if not callable(given) or isinstance(given, scoped_session):
            msg = (
                f"app must be the WSGI application, a callable, got {app!r}. "
                "Write `SessionMiddleware(app, Session)`"
            )
            raise TypeError(msg)
        if commit_on == "auto":
            commit_on = choose_moment
        if not callable(commit_on) and commit_on not in MOMENTS:
            msg = (
                'commit_on must be "complete", "headers", "close", "auto" or callable, '
                f"got {commit_on!r}"
            )
            raise ValueError(msg)
        for name, value, meaning in (
            ("commit_veto", commit_veto, "commit_veto(environ, status, headers) -> bool"),
            ("commit_error", commit_error, "a WSGI application"),
            ("skip", skip, "skip(environ) -> bool"),
        ):
            if value is not None and not callable(value):
                msg = f"{name} must be None or callable, got {value!r}. Pass {meaning}"
                raise TypeError(msg)
        self.app = app
        self.observers = check_observers(observers)
        self._registries = adopt(registries)
        self._policy = Policy(commit_on, commit_veto, commit_error)
        self._skip = skip

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Handle one request."""
        if self._skip is not None and self._skip(environ):
            return self.app(environ, start_response)
        outer = find_scope() if "wsgi_dbsession.scope" in environ else None
        if outer is not None and outer.environ is environ:
            return self._join(outer, environ, start_response)
        observers = observers_of(self._registries, self.observers)
        scope = Scope(environ, observers)
        environ["wsgi_dbsession.scope"] = scope
        if observers:
            scope.notify("opened")
        return respond(self.app, environ, start_response, scope, self._policy)

    def _join(
        self, scope: Scope, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        """Handle a nested request: one environ is one unit of work, the outermost decides."""
        layer = getattr(self.app, "wsgi_app", None)
        while layer is not None and layer is not self:
            layer = getattr(layer, "app", None)  # a middleware around this one
        if layer is self:
            msg = (
                "the middleware must wrap app.wsgi_app, not app, which calls the middleware "
                "again. Write `app.wsgi_app = SessionMiddleware(app.wsgi_app, Session)`"
            )
            raise RuntimeError(msg)
        scope.join(observers_of(self._registries, self.observers))
        return self.app(environ, start_response)
