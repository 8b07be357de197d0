"""*Which*: the outcome of a unit of work, and everything that belongs to it.

``Unit._decide`` returns the first matching row, and the rest carries it out.
"""

from __future__ import annotations

import warnings
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Literal

from ._fork import inherited
from ._observed import Observed
from ._report import add_note, log
from ._transaction import Commit, is_autocommit, is_begun, is_inherited, rollback, undo

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextvars import Context

    from _typeshed.wsgi import WSGIEnvironment
    from sqlalchemy.orm import Session
    from sqlalchemy.util import ScopedRegistry

    from ._hooks import Hook
    from ._observed import Outcome, Reason
    from ._transaction import AdoptedSession, Truth

# RFC 9110, section 9.2.1: a request with one of these methods is not meant to write.
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})

_ENDLESS = (
    "over 100 subsequent outcomes of one scope: does a hook, or a listener of a commit, begin a "
    "new transaction each time?"
)

_OUTCOMES: dict[Truth, Outcome] = {
    "rolled back": "rollback",
    "unknown": "unknown",
    "committed": "commit",
    "partly committed": "partial",
}


class Unit(Observed):
    """A unit of work and its outcome; the base class of ``Scope``."""

    __slots__ = (
        "__weakref__",
        "_discarded",
        "_hooks",
        "_info",
        "_settling",
        "_word",
        "context",
        "read_only",
        "releases",
        "sessions",
    )

    read_only: bool | None
    """Whether the scope only reads, for the Session classes of :mod:`wsgi_dbsession.replica`.

    None if you have not set it. It counts for the transactions that begin afterwards.
    """

    sessions: dict[ScopedRegistry[Session], AdoptedSession]
    """The Sessions that were asked for, by the registry that keeps them here."""

    context: Context | None
    """That in which the application last asked for a Session: the outcome runs in it.

    None until then, and after an outcome that has covered everything.
    """

    def __init__(
        self,
        environ: WSGIEnvironment | None,
        observers: tuple[Any, ...] = (),
        name: str = "a request that is over",
    ) -> None:
        self.in_step = self._settling = False
        self._innermost = self._token = None
        self.environ = environ
        self.observers = observers
        self.sessions = {}
        self.outcome = self.reason = self.failure = self.context = self.read_only = None
        self._name = name
        self._info: dict[str, Any] | None = None
        self._word: Literal["doomed", "kept"] | None = None
        self._hooks: tuple[Hook, ...] = ()
        self.releases: tuple[Any, ...] = ()  # the released() blocks that are open
        self._discarded: BaseException | None = None

    def abandon(self) -> None:
        """Forget everything in a child process: it is the parent's."""
        super().abandon()
        inherited.append(self.sessions)  # their connections may be in no pool
        self.sessions, self._hooks, self._discarded, self.context = {}, (), None, None

    def undecided(self) -> bool:
        """Return whether there is something that no outcome has covered yet."""
        return self.context is not None and (self.outcome is None or self._has_begun())

    def _has_begun(self) -> bool:
        if self._hooks or self._discarded:
            return True
        for session in self.sessions.values():  # noqa: SIM110 - any() costs two calls more
            if is_begun(session):
                return True
        return False

    def _decide(
        self,
        error: BaseException | None,
        complete: bool,
        veto: Callable[[], str] | None,
    ) -> tuple[Outcome, Reason]:
        """Return the outcome and the reason: the first matching row."""
        if error is not None:
            return "rollback", "error"
        if self._word == "doomed":
            return "rollback", "doomed"
        if not complete:
            return "rollback", "incomplete"
        if self._word == "kept":
            return "commit", "kept"
        if veto is not None and (vetoed := veto()):
            self._log_discarded(vetoed)
            return "rollback", "veto"
        return "commit", "complete"

    def settle(
        self,
        error: BaseException | None = None,
        *,
        complete: bool = True,
        veto: Callable[[], str] | None = None,
        final: bool = True,
    ) -> None:
        """Decide, carry it out, and run the hooks; again for what those have begun.

        Call it in a step, where :meth:`undecided`. It runs in the application's context, and sets
        nothing in the caller's.

        :param veto: returns why to roll back, or an empty string.
        :param final: whether the scope ends with it, see :class:`Commit`.
        :raises BaseException: the veto raised or the commit failed.
        """
        failure: BaseException | None = None
        releases, self.releases = self.releases, ()  # an outcome needs connections
        for again in range(100):
            context = self.own(self.context or copy_context())
            try:
                context.run(self._settle, error, complete, veto, final)
            except BaseException as settling:
                failure = failure or settling
                if self.outcome == "rollback":
                    error = failure  # what its hooks began is rolled back too
                elif self.outcome != "commit":
                    break
                # A listener failed, or a hook was interrupted: what the others began is committed.
            if not self._has_begun():
                self.context = None
                break
            if again and self.outcome == "rollback" and not self._hooks:
                break  # a listener begins one at each rollback
        else:
            failure = failure or RuntimeError(_ENDLESS)
        self.releases = releases
        if failure is not None:
            raise failure

    def _settle(
        self,
        error: BaseException | None,
        complete: bool,
        veto: Callable[[], str] | None,
        final: bool,
    ) -> None:
        self._settling = True  # from here on the application does not close a Session
        try:
            outcome, reason = self._decide(error, complete, veto)
        except BaseException as failure:
            self._roll_back(failure, "error")
            raise
        if outcome == "commit":
            self._commit(reason, final)
        else:
            self._roll_back(error, reason)

    def _commit(self, reason: Reason, final: bool) -> None:
        commit = Commit(self.sessions, final=final)
        try:
            if self._discarded:
                raise self._discarded
            commit.run()
        except BaseException as failure:
            self.failure = failure
            self._fail(failure, *commit.explain(failure))
            raise
        self._conclude("commit", reason)

    def _fail(self, failure: BaseException, truth: Truth, explanation: str) -> None:
        self.outcome, self.reason = _OUTCOMES[truth], truth
        add_note(failure, f"{self.name}: {explanation}")
        try:
            rollback(self.sessions.values(), failure)
        finally:
            if not self.notify("commit_failed", failure):
                arguments = (self.name, explanation, failure)
                log.error("%s: %s: %s", *arguments, exc_info=failure, extra=self.extra())
            self._conclude(self.outcome, truth)

    def _roll_back(self, error: BaseException | None, reason: Reason) -> None:
        try:
            rollback(self.sessions.values(), error)
        finally:
            self._conclude("rollback", reason)

    def _conclude(self, outcome: Outcome, reason: Reason) -> None:
        self.outcome, self.reason = outcome, reason
        self._discarded, self._settling = None, False
        try:
            if self._hooks:
                self._run_hooks(outcome)
        finally:
            if self.observers:
                self.notify("settled")

    def _run_hooks(self, outcome: Outcome) -> None:
        interruption: BaseException | None = None
        # Hooks that are registered from here on wait for the next outcome.
        hooks, self._hooks = self._hooks, ()
        for hook in hooks:
            if hook.outcome == outcome:
                self.notify("hook_called", hook.function)
                # Even after an interruption the other hooks run.
                failure = hook.run(self.name, self.extra())
                interruption = interruption or failure
        if interruption is not None:
            raise interruption

    def _log_discarded(self, vetoed: str) -> None:
        method = (self.environ or {}).get("REQUEST_METHOD")
        for session in self.sessions.values():
            # Whether a statement wrote is unknown, so the method decides.
            if session.in_transaction() and (
                method not in _SAFE_METHODS or session.new or session.dirty or session.deleted
            ):
                but = ", except what AUTOCOMMIT has committed" if is_autocommit(session) else ""
                message = "%s: discarding uncommitted changes%s: %s; scope.keep() commits them"
                if not self.notify("discarding", vetoed):
                    log.info(message, self.name, but, vetoed, extra=self.extra())
                return

    def close(
        self,
        error: BaseException | None = None,
        *,
        complete: bool = True,
        veto: Callable[[], str] | None = None,
    ) -> None:
        """Settle what is undecided and close the Sessions. Call it in the last step.

        :raises BaseException: see :meth:`settle`; the Sessions are closed all the same. Nothing
            is raised where there is an `error`: the first one is the one that propagates.
        """
        failure: BaseException | None = None
        try:
            if self.undecided():
                self.settle(error, complete=complete, veto=veto)
        except BaseException as settling:
            failure = settling
        interruption = self.close_sessions() if self.sessions else None
        failure = failure or interruption
        # From here on nothing would close a Session, and an interruption may skip leave().
        self.in_step = False
        if self.observers:
            self.notify("closed")
        # The environ and the context refer to this scope: a cycle until a collection.
        self.environ = self.context = None
        if error is None and failure is not None:
            raise failure

    def drop(self) -> None:
        """Close the Sessions of a response that was dropped without ``close()``.

        For a finalizer, so it runs no code of the application and touches no context variable.
        """
        if any(map(is_inherited, self.sessions.values())):
            self.abandon()
        undecided, name = self.undecided(), self.name
        self.close_sessions()
        self.environ = self.context = None
        if undecided:
            self.outcome, self.reason = "rollback", "incomplete"
            message = f"{name}: response dropped without close(), rolling back"
            warnings.warn(message, ResourceWarning, stacklevel=2)

    def close_sessions(self) -> BaseException | None:
        """Close the Sessions, each even if another fails.

        :return: the first interruption, see :func:`undo`.
        """
        interruption = None
        for _ in range(len(self.sessions) + 100):  # a listener may begin a new one at each end
            if not self.sessions:
                break
            session = self.sessions.pop(next(iter(self.sessions)))
            failure = undo(session, "close")
            interruption = interruption or failure
        return interruption
