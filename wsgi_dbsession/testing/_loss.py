"""Detect that the outer transaction of an isolation, or one of its savepoints, is gone."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from sqlalchemy import exc

from ._place import application_line

if TYPE_CHECKING:
    from collections.abc import Generator

    from ._outer import OuterTransaction
    from ._savepoints import Savepoints

_BROKEN = "the connection of the isolation was lost, with all that was done on it"
_HOW = {
    True: "the outer transaction of the isolation was committed, so the rows that were written in "
    "it remain in the database: delete them.",
    False: "the outer transaction of the isolation was rolled back. Rows that were written and "
    "committed after that remain in the database.",
    None: "the outer transaction of the isolation has ended. If it was committed, the rows that "
    "were written in it remain in the database: delete them.",
}
_INSTEAD = (
    "Look for a COMMIT or ROLLBACK in a textual statement, on a cursor or on the driver's "
    "connection, for executescript() and ON CONFLICT ROLLBACK of SQLite, and for statements of "
    "MySQL that define tables: call Session.commit() or Session.rollback() instead"
)


class Loss:
    """Whether and how the isolation has lost its outer transaction."""

    def __init__(self, outer: OuterTransaction, savepoints: Savepoints) -> None:
        self.message: str | None = None
        """How it was lost; None until then."""

        self._outer = outer
        self._savepoints = savepoints

    def mark_broken(self) -> None:
        """Record that the connection is broken."""
        self.message = self.message or _BROKEN

    def check_connection(self) -> None:
        """Record it if the connection is broken."""
        if self._outer.connection.invalidated:
            self.mark_broken()

    def check(self) -> None:
        """Raise if the outer transaction is lost."""
        self.check_connection()
        if self.message is None and self._outer.has_ended():
            self._find()
        if self.message is not None:
            raise RuntimeError(self.message)

    @contextlib.contextmanager
    def detecting(self) -> Generator[None]:
        """Detect that a savepoint is gone, perhaps with the outer transaction.

        :raises RuntimeError: a statement in the block has failed.
        """
        try:
            yield
        except exc.DBAPIError as error:
            if self._outer.connection.invalidated:
                self.mark_broken()
            else:
                try:
                    self._savepoints.undo(self._savepoints.stack[0])
                except exc.DBAPIError:
                    self._find()
                else:
                    self.message = (
                        "a savepoint of the isolation is gone. "
                        f"This was noticed at {application_line()}. "
                        "A textual ROLLBACK TO SAVEPOINT or RELEASE SAVEPOINT removes those that "
                        "were set later: call Session.begin_nested() instead"
                    )
            raise RuntimeError(self.message) from error

    def _find(self) -> None:
        how = _HOW[self._outer.was_committed()]
        self.message = f"{how} This was noticed at {application_line()}. {_INSTEAD}"
