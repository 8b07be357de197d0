"""Whether the application has written something besides the key, when a Session is closed."""

from __future__ import annotations

import contextlib
import re
import weakref
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.exc import InvalidRequestError

from wsgi_dbsession import _driver
from wsgi_dbsession._transaction import connections, has_changes, has_written

if TYPE_CHECKING:
    from sqlalchemy import Connection, Table

# Statements that usually only read. A SELECT may call a function that writes, so it is unknown.
_READ = re.compile(
    r"(?:\s|\(|/\*.*?\*/|--[^\n]*\n)*(?:SELECT|VALUES|SHOW|EXPLAIN|SET|SAVEPOINT|RELEASE|ROLLBACK|"
    r"WITH(?!.*\b(?:INSERT|UPDATE|DELETE|MERGE)\b))\b",
    re.DOTALL | re.IGNORECASE,
)


class Written:
    """Replaces ``has_written()`` for the transaction of the key, which would count the key.

    A ``Session.remove()`` that discards only the key does no harm: the row is written again.

    :param session: the Session, in the transaction of the key.
    :param connection: the connection of that transaction.
    :param table: the table of keys.
    """

    __slots__ = ("__weakref__", "_connection", "_has_written", "_table")

    def __init__(self, session: Any, connection: Connection, table: Table) -> None:
        self._table = table
        self._has_written = False
        # A weak reference: the connection must not be part of a cycle.
        self._connection = weakref.ref(connection)
        # SQLAlchemy 2.0 refuses listeners of isolate()'s connections.
        with contextlib.suppress(InvalidRequestError):
            event.listen(connection, "before_cursor_execute", self._before_cursor_execute)
            session.dbsession_has_written = self.has_written

    def has_written(self, session: Any) -> bool | None:
        """Return whether the application has written something, None if unknown."""
        wrote = has_written(session)
        if (
            not wrote
            or self._has_written
            or has_changes(session)
            or session.dbsession_flushed is not None
        ):
            return wrote
        others = [each for each, _ in connections(session) if each is not self._connection()]
        return True if any(map(_driver.has_written, others)) else None

    def _before_cursor_execute(
        self, _: Connection, __: Any, statement: str, ___: Any, context: Any, ____: bool
    ) -> None:
        written = getattr(getattr(context.compiled, "statement", None), "table", None)
        if written is not self._table and not _READ.match(statement):
            self._has_written = True
