"""The middleware: checks at construction, nesting, and the scope of each request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

from ._response import CommitOn, Policy, respond
from ._scope import check_registries, make_scope, scope_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from sqlalchemy.orm import scoped_session

    from ._response import CommitVeto


def default_commit_veto(
    environ: WSGIEnvironment, status: str, headers: list[tuple[str, str]]
) -> bool:
    """Roll back on status 4xx and 5xx.

    Frameworks turn exceptions into such responses before a middleware could see them. The
    signature is that of ``repoze.tm2``, so a veto of an existing application works.

    :param environ: the request's environ.
    :param status: the status line, such as ``"404 Not Found"``.
    :param headers: the response's headers, pairs of name and value.
    :return: whether to roll back.
    """
    return "4" <= status < "6"


class SessionMiddleware:
    """Give every request Sessions of its own, and end them when the response is complete.

    ::

        Session = scoped_session(sessionmaker(engine), scopefunc=current_scope)
        app.wsgi_app = SessionMiddleware(app.wsgi_app, Session)

    :param app: the WSGI application.
    :param registries: its session registries: ``scoped_session`` objects whose ``scopefunc`` is
        :func:`current_scope`. All of them share one outcome.
    :param commit_on: the moment of the outcome. ``"complete"``: the last at which a failure still
        shows to the client. ``"headers"``: always before the response's start, what a stream does
        after it runs in a transaction of its own. ``"close"``: when the response is closed, which
        is when the client has all of it already.
    :param commit_veto: called with environ, status and headers, returns whether to roll back;
        None commits on every status.
    :param commit_error: a WSGI application that answers where the commit failed and nothing has
        been sent yet; ``sys.exc_info()`` tells it which error that was. It runs after the scope.
        None raises the error into the server.
    :param skip: called with environ, returns whether to pass the request through untouched.
    :raises TypeError: a registry is no ``scoped_session``, or an argument is not callable.
    :raises ValueError: no registry was given, one has another ``scopefunc``, or ``commit_on`` is
        none of the three.
    """

    def __init__(
        self,
        app: WSGIApplication,
        *registries: scoped_session[Any],
        commit_on: CommitOn = "complete",
        commit_veto: CommitVeto | None = default_commit_veto,
        commit_error: WSGIApplication | None = None,
        skip: Callable[[WSGIEnvironment], bool] | None = None,
    ) -> None:
        if not callable(app):
            msg = f"the first argument is the WSGI application, a callable, not {app!r}"
            raise TypeError(msg)
        if commit_on not in get_args(CommitOn):
            choice = ", ".join(map(repr, get_args(CommitOn)))
            msg = f"commit_on is one of {choice}, not {commit_on!r}"
            raise ValueError(msg)
        for name, value, meaning in (
            ("commit_veto", commit_veto, "commit_veto(environ, status, headers) -> bool"),
            ("commit_error", commit_error, "a WSGI application"),
            ("skip", skip, "skip(environ) -> bool"),
        ):
            if value is not None and not callable(value):
                msg = f"{name} is a callable, {meaning}, or None, not {value!r}"
                raise TypeError(msg)
        self.app = app
        self._registries = check_registries(registries)
        self._policy = Policy(commit_on, commit_veto, commit_error)
        self._skip = skip

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Handle one request."""
        if self._skip is not None and self._skip(environ):
            return self.app(environ, start_response)
        outer = scope_of(environ)
        if outer is not None:
            # Nested: one environ is one unit of work, and the outermost middleware decides.
            outer.join(self._registries)
            return self.app(environ, start_response)
        scope = make_scope(self._registries, environ)
        environ["wsgi_dbsession.scope"] = scope
        return respond(self.app, environ, start_response, scope, self._policy)
