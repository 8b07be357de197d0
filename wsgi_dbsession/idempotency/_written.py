"""Whether the application wrote something besides the key, in a transaction that is discarded."""

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

# A SELECT may call a function that writes, so it is unknown what these have done.
_READ = re.compile(
    r"(?:\s|\(|/\*.*?\*/|--[^\n]*\n)*(?:SELECT|VALUES|SHOW|EXPLAIN|SET|SAVEPOINT|RELEASE|ROLLBACK|"
    r"WITH(?!.*\b(?:INSERT|UPDATE|DELETE|MERGE)\b))\b",
    re.DOTALL | re.IGNORECASE,
)


class Written:
    """Answers for a transaction in which the database counts the key among what was written.

    A ``Session.remove()`` that discards the key alone does no harm: it is written again.

    :param session: the Session, in the transaction of the key.
    :param connection: that of the key.
    :param table: the table of keys.
    """

    __slots__ = ("__weakref__", "_connection", "_has_written", "_table")

    def __init__(self, session: Any, connection: Connection, table: Table) -> None:
        self._table = table
        self._has_written = False
        # A weak one, or the connection would be part of a cycle.
        self._connection = weakref.ref(connection)
        # SQLAlchemy 2.0 refuses a listener of the connections of isolate().
        with contextlib.suppress(InvalidRequestError):
            event.listen(connection, "before_cursor_execute", self._see)
            session.dbsession_has_written = self.ask

    def ask(self, session: Any) -> bool | None:
        """Return whether the application has something to lose, None if unknown."""
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

    def _see(
        self, _: Connection, __: Any, statement: str, ___: Any, context: Any, ____: bool
    ) -> None:
        written = getattr(getattr(context.compiled, "statement", None), "table", None)
        if written is not self._table and not _READ.match(statement):
            self._has_written = True
