"""The seam to the core: what becomes of the scope of an attempt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wsgi_dbsession._scope import Observer

from ._attempt import attempt_of

if TYPE_CHECKING:
    from wsgi_dbsession._scope import Scope

    from ._attempt import Attempt


class _AttemptObserver(Observer):
    """Tells an attempt what becomes of its scope."""

    def discarding(self, scope: Scope, cause: str) -> bool:
        # A page with another status is a success, which is not run again.
        attempt = _owner_of(scope) if cause.startswith(("status 4", "status 5")) else None
        return attempt is not None and attempt.is_followed(None)

    def commit_failed(self, scope: Scope, failure: BaseException) -> bool:
        attempt = _owner_of(scope)
        return attempt is not None and attempt.will_retry(scope, failure)

    def settled(self, scope: Scope) -> None:
        attempt = _owner_of(scope)
        if attempt is not None:
            attempt.settle(scope)


def _owner_of(scope: Scope) -> Attempt | None:
    """Return the attempt of this very scope, not of one around it."""
    attempt = attempt_of(scope)
    if attempt is None or scope.environ is None:
        return attempt
    # A request in a request may have got a copy of its environ.
    return attempt if attempt.environ == id(scope.environ) else None


OBSERVER = _AttemptObserver()
