"""What a scope shows to observers and to the log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from ._report import describe, describe_path, log
from ._step import Step
from ._transaction import Truth

if TYPE_CHECKING:
    from typing import TypeAlias

    from _typeshed.wsgi import WSGIEnvironment

Outcome: TypeAlias = Literal["commit", "rollback", "unknown", "partial"]
Reason: TypeAlias = Literal["error", "doomed", "incomplete", "kept", "veto", "complete"] | Truth


class Observed(Step):
    """What observers and the log can see of a scope; a base class of ``Scope``."""

    __slots__ = ("_name", "environ", "failure", "observers", "outcome", "reason")

    environ: WSGIEnvironment | None
    """The request's environ; None in a ``session_scope`` block and once the request is over."""

    outcome: Outcome | None
    """What became of the work.

    None until it is decided, and where there is nothing to decide: no Session was asked for.
    "unknown" and "partial" are commits that failed half-way, see :attr:`reason`.
    """

    reason: Reason | None
    """Why: "error", "doomed", "incomplete", "kept", "veto" or "complete".

    After a failed commit, what the database did: "rolled back", "unknown", "committed" or
    "partly committed".
    """

    failure: BaseException | None
    """The error of the commit that failed."""

    observers: tuple[Any, ...]
    """The observers of this scope."""

    _name: str

    @property
    def name(self) -> str:
        """``"POST /notes"`` for a request, and the name of the block otherwise."""
        return self._name if self.environ is None else describe(self.environ)

    def join(self, observers: tuple[Any, ...]) -> None:
        """Add the observers of a nested middleware."""
        new = tuple(each for each in dict.fromkeys(observers) if each not in self.observers)
        self.observers += new
        self.notify("opened", to=new)

    def notify(self, method: str, *arguments: object, to: tuple[Any, ...] | None = None) -> bool:
        """Call the observers, or some of them.

        :return: whether one of them has dealt with it.
        """
        dealt_with = False
        for observer in self.observers if to is None else to:
            if method in observer.overridden:
                try:
                    if getattr(observer, method)(self, *arguments) is True:
                        dealt_with = True
                except Exception:
                    message = "observer failed in %s(): %r"
                    log.exception(message, method, observer, extra=self.extra())
        return dealt_with

    def extra(self) -> dict[str, object]:
        """Return the fields of a log record, for machines."""
        environ = self.environ or {}
        return {
            "method": environ.get("REQUEST_METHOD"),
            "path": None if self.environ is None else describe_path(environ),
            "scope": self.name,
            "outcome": self.outcome,
            "reason": self.reason,
        }
