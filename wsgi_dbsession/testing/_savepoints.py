"""The savepoints of the shared connection: each transaction of the application is one."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

from wsgi_dbsession._report import log

from ._place import application_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Connection


class IsolatedTransaction:
    """A transaction of the application: in the database, a savepoint."""

    __slots__ = (
        "began",
        "is_open",
        "opened",
        "replaced",
        "settings",
        "thread",
        "undone",
        "violations",
    )

    began: Savepoint
    """The savepoint that its begin has set."""

    opened: str
    """The line that began it."""

    thread: int
    """The thread that used it last."""

    undone: str | None
    """Why its work was undone, so that it cannot continue; otherwise None."""

    settings: dict[str, str]
    """The values of the tracked settings, as last saved."""

    replaced: list[tuple[str, str]]
    """The settings of the connection that it has changed, each with its previous value."""

    violations: Counter[Any]
    """Its violations of deferred constraints, as last found."""

    def __init__(self) -> None:
        self.is_open = False
        self.opened = application_line()
        self.thread = threading.get_ident()
        self.undone = None
        self.settings = {}
        self.replaced = []
        self.violations = Counter()


class Savepoint:
    """A savepoint, and the transactions that wrote between it and the next one."""

    __slots__ = ("ended", "failed", "name", "owner", "replaced", "settings", "writers")

    def __init__(self, name: str, owner: IsolatedTransaction | None) -> None:
        self.name = name
        self.owner = owner  # None: an isolation
        self.settings: dict[str, str] = {}  # in force when it was set
        self.replaced = 0 if owner is None else len(owner.replaced)  # the number at this point
        self.writers: set[IsolatedTransaction] = set()
        self.ended = False
        self.failed = False


class Savepoints:
    """The savepoints of a connection, the innermost last. The caller holds the lock."""

    def __init__(self, connection: Connection) -> None:
        self.stack: list[Savepoint] = []
        self.problems: list[str] = []
        self.reporting = True
        self._connection = connection
        self._dialect = connection.dialect
        self._numbers = itertools.count(1)

    def has_written(self, transaction: IsolatedTransaction) -> bool:
        """Return whether a transaction has written something that was not rolled back."""
        return any(transaction in each.writers for each in self.stack)

    def has_failed(self, transaction: IsolatedTransaction) -> bool:
        """Return whether PostgreSQL had aborted a transaction when another one began."""
        mine = [each for each in self.stack if each.owner is transaction]
        return bool(mine) and mine[-1].failed

    def set(self, owner: IsolatedTransaction | None) -> Savepoint:
        """Set a savepoint."""
        savepoint = Savepoint(f"wsgi_dbsession_{next(self._numbers)}", owner)
        self._emit(self._dialect.do_savepoint, savepoint.name)
        self.stack.append(savepoint)
        return savepoint

    def end(self, savepoint: Savepoint) -> None:
        """Release the savepoint, once those that were set after it have ended."""
        savepoint.ended = True
        self._release_ended()

    def commit(self, owner: IsolatedTransaction) -> None:
        """End all savepoints of a transaction."""
        for savepoint in self.stack:
            if savepoint.owner is owner:
                savepoint.ended = True
        self._release_ended()

    def roll_back(self, savepoint: Savepoint, *, aborted: bool) -> None:
        """Undo what the owner of a savepoint did since, and end the savepoint.

        :param aborted: whether PostgreSQL accepts only a rollback.
        """
        if savepoint not in self.stack:
            return  # already undone with an earlier savepoint
        inner = self.stack[self.stack.index(savepoint) :]
        writers = set[IsolatedTransaction]().union(*(each.writers for each in inner))
        if not writers or savepoint.owner in writers or aborted:
            survivors = self.undo(savepoint)
            self.end(savepoint)
            for survivor in survivors:
                self._emit(self._dialect.do_savepoint, survivor.name)
                self.stack.append(survivor)
        else:
            self.end(savepoint)

    def undo(self, savepoint: Savepoint) -> list[Savepoint]:
        """Undo everything that was done since a savepoint was set.

        :return: later savepoints to set again, because their owners have lost no work.
        """
        index = self.stack.index(savepoint)
        inner = self.stack[index:]
        writers = set[IsolatedTransaction]().union(*(each.writers for each in inner))
        owner = savepoint.owner
        self._emit(self._dialect.do_rollback_to_savepoint, savepoint.name)
        for writer in writers - {owner}:
            if writer.is_open:
                writer.undone = (
                    f"the transaction begun at {writer.opened} is undone by the rollback of an "
                    f"earlier one{'' if owner is None else f', begun at {owner.opened}'}, because "
                    "both share the connection of the isolation"
                )
            elif owner is not None:
                self._report(writer, owner)
        del self.stack[index + 1 :]
        savepoint.writers = set()
        savepoint.failed = False
        return [
            each
            for each in inner[1:]
            if not each.ended and each.owner is not owner and each.owner not in writers
        ]

    def _emit(self, order: Callable[[Connection, str], None], name: str) -> None:
        order(self._connection, name)

    def _release_ended(self) -> None:
        """Release the ended savepoints at the top; those below an open one must wait."""
        while self.stack[-1].ended:
            ended = self.stack[-1]
            self._emit(self._dialect.do_release_savepoint, ended.name)
            self.stack.pop()
            if self.stack:
                self.stack[-1].writers |= ended.writers
            else:
                return
        self._move_readers()

    def _move_readers(self) -> None:
        """Move the savepoints of transactions that have only read behind what others committed.

        Otherwise their rollback would undo it. Usually it is an open transaction of the test
        itself, which has read something.
        """
        first = len(self.stack)
        writers: set[IsolatedTransaction] = set()
        while True:
            below = self.stack[first - 1]
            if below.owner is None or below.failed or below.owner in writers | below.writers:
                break
            writers |= below.writers
            first -= 1
        if not writers:
            return
        movers = self.stack[first:]
        self._emit(self._dialect.do_release_savepoint, movers[0].name)
        self.stack[first - 1].writers |= writers
        for mover in movers:
            mover.writers = set()
            self._emit(self._dialect.do_savepoint, mover.name)

    def _report(self, committed: IsolatedTransaction, undone_by: IsolatedTransaction) -> None:
        problem = (
            f"the transaction begun at {undone_by.opened} wrote something and was rolled back. "
            f"That has undone what the one begun at {committed.opened} had committed meanwhile, "
            "because in the isolation both share one connection. In production it stays: run this "
            "test without isolation, see docs/testing.md"
        )
        if self.reporting and problem not in self.problems:
            self.problems.append(problem)
            log.error("%s", problem)
