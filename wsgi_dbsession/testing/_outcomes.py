"""Record the outcome of each scope, for the assertions of tests."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from wsgi_dbsession._registry import adopt, observe
from wsgi_dbsession._scope import Observer

from ._place import application_line

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from sqlalchemy.orm import scoped_session

    from wsgi_dbsession._observed import Outcome, Reason
    from wsgi_dbsession._scope import Scope


class Recorded:
    """The record of one scope: ``assert outcomes[-1].reason == "veto"``."""

    __slots__ = ("ended", "hooks", "name", "opened", "scope", "settled")

    name: str
    """``"POST /notes"`` for a request, ``"session_scope"`` for a block."""

    opened: str
    """The line of the test or the application that opened it, not a line of a library."""

    settled: list[tuple[Outcome, Reason]]
    """Every outcome, in order.

    A scope that works on after its first outcome has another one, such as a stream. ``outcome``
    and ``reason`` are those of the first.
    """

    hooks: list[Callable[..., object]]
    """The hooks that ran, in order."""

    ended: bool
    """Whether its response was closed or its block left. Its Sessions are closed then."""

    scope: Scope | None
    """The scope itself; None when it has ended."""

    def __init__(self, scope: Scope) -> None:
        self.name = scope.name
        self.opened = application_line()
        self.settled = []
        self.hooks = []
        self.ended = False
        self.scope = scope

    @property
    def outcome(self) -> Outcome | None:
        """The outcome; None while it is undecided, or if no Session was used."""
        return self._first()[0]

    @property
    def reason(self) -> Reason | None:
        """The reason for it, see ``Scope.reason``."""
        return self._first()[1]

    def _first(self) -> tuple[Outcome | None, Reason | None]:
        if self.settled:
            return self.settled[0]
        # A response that was dropped has an outcome, but its finalizer notifies no observer.
        scope = self.scope
        return (None, None) if scope is None else (scope.outcome, scope.reason)

    def __repr__(self) -> str:
        if self.outcome is not None:
            return f"<{self.name}: {self.outcome}, {self.reason}>"
        return f"<{self.name}: {'nothing to decide' if self.ended else 'undecided'}>"


class _Recorder(Observer):
    """Keeps a list of the scopes and their outcomes."""

    def __init__(self) -> None:
        self.outcomes: list[Recorded] = []
        # A copy, because a test may clear or change the list above.
        self._open: list[Recorded] = []

    def _find(self, scope: Scope) -> Recorded:
        return next(each for each in reversed(self._open) if each.scope is scope)

    def opened(self, scope: Scope) -> None:
        record = Recorded(scope)
        self._open.append(record)
        self.outcomes.append(record)

    def hook_called(self, scope: Scope, hook: Callable[..., object]) -> None:
        self._find(scope).hooks.append(hook)

    def settled(self, scope: Scope) -> None:
        assert scope.outcome is not None
        assert scope.reason is not None
        self._find(scope).settled.append((scope.outcome, scope.reason))

    def closed(self, scope: Scope) -> None:
        record = self._find(scope)
        if record.outcome is not None and not record.settled:
            self.settled(scope)  # a response that was dropped before
        self._open.remove(record)
        record.ended = True
        record.scope = None


@contextlib.contextmanager
def record_outcomes(*registries: scoped_session[Any]) -> Generator[list[Recorded]]:
    """Record each scope of these registries that is opened in the block, in any thread.

    ::

        with record_outcomes(Session) as outcomes:
            client.post("/notes", data={"text": ""})
        assert outcomes[-1].reason == "veto"

    :param registries: the application's ``scoped_session`` objects.
    :return: the list of the scopes, in the order in which they are opened.
    :raises TypeError: see :class:`wsgi_dbsession.session_scope`.
    :raises ValueError: likewise.
    """
    recorder = _Recorder()
    with contextlib.ExitStack() as observed:
        adopt(registries)
        for registry in dict.fromkeys(registries):
            observed.enter_context(observe(registry, recorder))
        yield recorder.outcomes
