"""The hooks of a scope: what runs after its outcome."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ._report import log

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextvars import Context

    from sqlalchemy.orm import Session, SessionTransaction


class Hook(NamedTuple):
    """A function that waits for an outcome, and where it was registered."""

    outcome: str
    function: Callable[..., object]
    arguments: tuple[object, ...]
    context: Context
    savepoints: tuple[SessionTransaction, ...]

    def run(self, name: str, extra: dict[str, object]) -> BaseException | None:
        """Call the function in its context, and log an error.

        :return: the error if it is an interruption, which no ``Exception`` is.
        """
        try:
            self.context.run(self.function, *self.arguments)
        except BaseException as error:
            message = "%s: a hook failed after the %s: %r"
            log.exception(message, name, self.outcome, self.function, extra=extra)
            return None if isinstance(error, Exception) else error
        return None


def open_savepoints(session: Session) -> list[SessionTransaction]:
    """Return the savepoint in which a Session is, and each transaction around it."""
    found: list[SessionTransaction] = []
    transaction = session.get_nested_transaction()
    while transaction is not None:
        found.append(transaction)
        transaction = transaction.parent
    return found
