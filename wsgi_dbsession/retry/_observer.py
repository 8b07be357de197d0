"""The observer that passes the outcomes of scopes to their attempts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wsgi_dbsession._scope import Observer

from ._attempt import attempt_of

if TYPE_CHECKING:
    from wsgi_dbsession._scope import Scope

    from ._attempt import Attempt


class _AttemptObserver(Observer):
    """Passes outcomes to attempts, and keeps the core from logging what is retried."""

    def discarding(self, scope: Scope, cause: str) -> bool:
        # A response with another status is a success, which is never retried.
        attempt = _own_attempt(scope) if cause.startswith(("status 4", "status 5")) else None
        return attempt is not None and attempt.will_retry(None)

    def commit_failed(self, scope: Scope, failure: BaseException) -> bool:
        attempt = _own_attempt(scope)
        return attempt is not None and attempt.fail_commit(failure)

    def settled(self, scope: Scope) -> None:
        attempt = _own_attempt(scope)
        if attempt is not None:
            attempt.settle(scope)


def _own_attempt(scope: Scope) -> Attempt | None:
    """Return the scope's own attempt, and not that of an outer request."""
    attempt = attempt_of(scope)
    if attempt is None or scope.environ is None:
        return attempt
    # An inner request may have a copy of the outer one's environ.
    return attempt if attempt.environ == id(scope.environ) else None


OBSERVER = _AttemptObserver()
