"""The savepoints of the shared connection: one for each transaction of the application."""

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
    """What the application takes for a transaction."""

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
    """The savepoint that it began with."""

    opened: str
    """The line that began it."""

    thread: int
    """The thread that used it last."""

    undone: str | None
    """Why it cannot go on: its work is undone."""

    settings: dict[str, str]
    """The settings that it has made for itself, as far as they are known."""

    replaced: list[tuple[str, str]]
    """The settings of the connection that it has changed, each with the value before that."""

    violations: Counter[Any]
    """The violations of deferred constraints that its work has brought about so far."""

    def __init__(self) -> None:
        self.is_open = False
        self.opened = application_line()
        self.thread = threading.get_ident()
        self.undone = None
        self.settings = {}
        self.replaced = []
        self.violations = Counter()


class Savepoint:
    """A savepoint, and who wrote after it was set and before the next one was."""

    __slots__ = ("ended", "failed", "name", "owner", "replaced", "settings", "writers")

    def __init__(self, name: str, owner: IsolatedTransaction | None) -> None:
        self.name = name
        self.owner = owner  # None: an isolation
        self.settings: dict[str, str] = {}  # those in force when it was set
        self.replaced = 0 if owner is None else len(owner.replaced)  # how many it had changed
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

    def wrote(self, transaction: IsolatedTransaction) -> bool:
        """Return whether it has written something that was not rolled back."""
        return any(transaction in each.writers for each in self.stack)

    def has_failed(self, transaction: IsolatedTransaction) -> bool:
        """Return whether PostgreSQL has aborted it, though another one has begun meanwhile."""
        mine = [each for each in self.stack if each.owner is transaction]
        return bool(mine) and mine[-1].failed

    def set(self, owner: IsolatedTransaction | None) -> Savepoint:
        """Set a savepoint."""
        savepoint = Savepoint(f"wsgi_dbsession_{next(self._numbers)}", owner)
        self._emit(self._dialect.do_savepoint, savepoint.name)
        self.stack.append(savepoint)
        return savepoint

    def end(self, savepoint: Savepoint) -> None:
        """Release the savepoint as soon as those that were set after it have ended."""
        savepoint.ended = True
        self._release_ended()

    def commit(self, owner: IsolatedTransaction) -> None:
        """End all savepoints of a transaction."""
        for savepoint in self.stack:
            if savepoint.owner is owner:
                savepoint.ended = True
        self._release_ended()

    def roll_back(self, savepoint: Savepoint, *, aborted: bool) -> None:
        """Undo what its owner did since, and forget the savepoint.

        :param aborted: whether PostgreSQL accepts nothing but a rollback.
        """
        if savepoint not in self.stack:
            return  # undone already, with a savepoint around it
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
        """Undo what was done since, whoever did it.

        :return: the savepoints set since whose owners have lost nothing, to be set again.
        """
        index = self.stack.index(savepoint)
        inner = self.stack[index:]
        writers = set[IsolatedTransaction]().union(*(each.writers for each in inner))
        owner = savepoint.owner
        self._emit(self._dialect.do_rollback_to_savepoint, savepoint.name)
        for writer in writers - {owner}:
            if writer.is_open:
                writer.undone = (
                    f"the transaction begun at {writer.opened} is undone, because it shares the "
                    "connection of the isolation with one that began before it and was rolled back"
                    f"{'' if owner is None else f': that begun at {owner.opened}'}"
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
        """Release what has ended. What lies below one that has not must wait for that."""
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
        """Set the savepoints of those who have only read again, after what others have committed.

        Their rollback must not undo it. The usual case is an open transaction of the test itself,
        which has read something.
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
