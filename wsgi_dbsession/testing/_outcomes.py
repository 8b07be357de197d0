"""What became of each scope, for tests to look at."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from wsgi_dbsession._scope import SCOPE_CLASS, Outcome, Reason, Scope, check_registries, describe

from ._place import place

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from _typeshed.wsgi import WSGIEnvironment
    from sqlalchemy.orm import scoped_session

_RECORDS = "_wsgi_dbsession_records"


class Recorded:
    """One scope, as a test sees it: ``assert outcomes[-1].reason == "veto"``."""

    __slots__ = ("ended", "hooks", "name", "opened", "outcome", "reason", "scope", "settled")

    name: str
    """``"POST /notes"`` for a request, ``"session_scope"`` for a block."""

    opened: str
    """The line that opened it: of the test or the application, not of a library."""

    outcome: Outcome | None
    """What became of its work: None while that is undecided, or if no Session was asked for."""

    reason: Reason | None
    """Why: see ``Scope.reason``."""

    settled: list[tuple[Outcome, Reason]]
    """Each outcome in order: what works on after the first one has a second one.

    A stream may, and a hook that reads. Above stands the first.
    """

    hooks: list[Callable[[], object]]
    """The hooks that ran, in order."""

    ended: bool
    """Whether its response was closed or its block left, so that its Sessions are gone."""

    scope: Scope | None
    """The scope itself until it has ended."""

    def __init__(self, scope: Scope) -> None:
        environ = scope.environ
        self.name = "session_scope" if environ is None else describe(environ)
        self.opened = place()
        self.outcome = None
        self.reason = None
        self.settled = []
        self.hooks = []
        self.ended = False
        self.scope = scope

    def __repr__(self) -> str:
        if self.outcome is not None:
            return f"<{self.name}: {self.outcome}, {self.reason}>"
        return f"<{self.name}: {'nothing to decide' if self.ended else 'undecided'}>"


class _RecordedScope(Scope):
    """A scope that tells what becomes of it."""

    __slots__ = ("_record",)

    def __init__(
        self,
        registries: tuple[scoped_session[Any], ...],
        environ: WSGIEnvironment | None = None,
    ) -> None:
        super().__init__(registries, environ)
        self._record = record = Recorded(self)
        found: list[list[Recorded]] = []
        for registry in registries:
            for records in vars(registry).get(_RECORDS, ()):
                if not any(records is each for each in found):
                    found.append(records)
                    records.append(record)

    def on_commit(self, hook: Callable[[], object]) -> None:
        super().on_commit(_Hook(self._record, hook))

    def on_rollback(self, hook: Callable[[], object]) -> None:
        super().on_rollback(_Hook(self._record, hook))

    def settle(
        self,
        error: BaseException | None = None,
        *,
        complete: bool = True,
        veto: Callable[[], bool] | None = None,
    ) -> None:
        try:
            super().settle(error, complete=complete, veto=veto)
        finally:
            record, outcome, reason = self._record, self.outcome, self.reason
            assert outcome is not None
            assert reason is not None
            record.settled.append((outcome, reason))
            record.outcome, record.reason = record.settled[0]

    def end(
        self,
        error: BaseException | None = None,
        *,
        complete: bool = True,
        veto: Callable[[], bool] | None = None,
    ) -> None:
        try:
            super().end(error, complete=complete, veto=veto)
        finally:
            self._record.ended = True
            self._record.scope = None


class _Hook:
    """A hook that leaves a note when it runs; in log lines it looks like the original."""

    __slots__ = ("_hook", "_record")

    def __init__(self, record: Recorded, hook: Callable[[], object]) -> None:
        self._record = record
        self._hook = hook

    def __call__(self) -> None:
        self._record.hooks.append(self._hook)
        self._hook()

    def __repr__(self) -> str:
        return repr(self._hook)


@contextlib.contextmanager
def record_outcomes(*registries: scoped_session[Any]) -> Generator[list[Recorded]]:
    """Record every scope of these registries that is opened in the block, in any thread.

    ::

        with record_outcomes(Session) as outcomes:
            client.post("/notes", data={"text": ""})
        assert outcomes[-1].reason == "veto"

    :param registries: the application's ``scoped_session`` objects.
    :return: the list that grows with each scope, in the order in which they were opened.
    :raises TypeError: see :class:`wsgi_dbsession.session_scope`.
    :raises ValueError: likewise.
    """
    outcomes: list[Recorded] = []
    checked = check_registries(registries)
    for registry in checked:
        attributes = vars(registry)
        attributes[SCOPE_CLASS] = _RecordedScope
        attributes[_RECORDS] = (*attributes.get(_RECORDS, ()), outcomes)
    try:
        yield outcomes
    finally:
        for registry in checked:
            attributes = vars(registry)
            left = tuple(each for each in attributes[_RECORDS] if each is not outcomes)
            if left:
                attributes[_RECORDS] = left
            else:
                del attributes[_RECORDS], attributes[SCOPE_CLASS]
