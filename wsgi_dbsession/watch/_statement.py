"""Tell from the words of a statement whether it writes."""

from __future__ import annotations

import re

_FIRST_WORD = re.compile(r"(?:\s|\(|--[^\n]*\n|/\*.*?\*/)*([A-Za-z]+)", re.DOTALL)
_DML = re.compile(r"\b(?:insert|update|delete|merge)\b", re.IGNORECASE)
_READS = frozenset(
    [
        "select",
        "show",
        "explain",
        "values",
        "table",
        "pragma",
        "set",
        "begin",
        "start",
        "savepoint",
        "release",
        "rollback",
        "commit",
        "declare",
        "fetch",
        "close",
        "describe",
        "desc",
        "use",
        "listen",
    ]
)
_WRITES = frozenset(
    [
        "insert",
        "update",
        "delete",
        "merge",
        "replace",
        "create",
        "alter",
        "drop",
        "truncate",
        "grant",
        "revoke",
        "comment",
        "rename",
    ]
)
_MOST = 500
_LONGEST = 2000


class Reads(set[str]):
    """A cache of statements that write nothing: an application repeats few statements often."""

    def classify(self, statement: str) -> bool | None:
        """Return the result of :func:`writes`, and store the statement if it is False."""
        found = writes(statement)
        if found is False and len(statement) <= _LONGEST:
            if len(self) >= _MOST:
                self.clear()
            self.add(statement)
        return found


def writes(statement: str) -> bool | None:
    """Return whether a statement writes. None if unknown, such as for ``CALL``.

    A ``SELECT`` counts as a read, even if it calls a function that writes.
    """
    match = _FIRST_WORD.match(statement)
    word = match[1].lower() if match else ""
    if word == "with":
        return _DML.search(statement) is not None
    if word in _WRITES:
        return True
    return False if word in _READS else None
