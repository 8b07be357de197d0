"""Classify statements by their text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import Iterator

# Its alternatives must not overlap: otherwise many comments would take exponential time.
_GAP = r"(?:\s|/\*(?:[^*]|\*(?!/))*\*/|--[^\n]*(?:\n|$))"

_ENDING = re.compile(r"\b(?:COMMIT|END|ABORT|ROLLBACK|PREPARE)\b", re.IGNORECASE)
_ENDS = re.compile(
    r"\s*(?:COMMIT|END|ABORT|PREPARE\s+TRANSACTION|ROLLBACK(?!\s+(?:\w+\s+)?TO\b))\b",
    re.IGNORECASE,
)
# Their bodies have semicolons, and their own END.
_COMPOUND = re.compile(
    r"\s*CREATE\b[^;]*\b(?:TRIGGER|FUNCTION|PROCEDURE|EVENT|RULE)\b", re.IGNORECASE
)
_COMMENT_OR_LITERAL = re.compile(
    r"""(?P<comment> --[^\n]* | /\*.*?\*/ )
    | \b[eE]'(?:[^'\\]|\\.|'')*' | '(?:[^']|'')*' | "(?:[^"]|"")*" | `[^`]*`
    | \$(?P<tag>\w*)\$.*?\$(?P=tag)\$
    """,
    re.VERBOSE | re.DOTALL,
)

_READS = re.compile(
    rf"(?:{_GAP}|\()*"
    r"(?:SELECT|SHOW|EXPLAIN|VALUES|TABLE|WITH|SET\s+LOCAL|PRAGMA(?![^;]*[=(]))\b",
    re.IGNORECASE | re.DOTALL,
)
_CHANGES = re.compile(
    rf"(?:{_GAP}|\()*(?:INSERT|UPDATE|DELETE|MERGE|REPLACE)\b", re.IGNORECASE | re.DOTALL
)
# These PRAGMAs write to the file, and a rollback undoes them.
_WRITING = r"(?:application_id|auto_vacuum|encoding|schema_version|user_version)"
_WRITES_NOTHING_ELSE = re.compile(
    rf"(?:{_GAP}|\()*"
    r"(?:DECLARE|FETCH|MOVE|CLOSE|LOCK|LISTEN|UNLISTEN|RESET(?!\s+ALL\b)"
    r"|SET(?!\s+(?:CONSTRAINTS|SESSION\s+CHARACTERISTICS)\b)"
    rf"|PRAGMA(?![^;]*\b{_WRITING}\b))\b",
    re.IGNORECASE | re.DOTALL,
)
_MAKES_SETTING = re.compile(rf"{_GAP}*(?:SET|RESET)\b", re.IGNORECASE | re.DOTALL)

_NAME = r"[A-Za-z_][\w$]*(?:\.[A-Za-z_][\w$]*)*"
_LOCAL = re.compile(
    rf"\bSET{_GAP}+LOCAL{_GAP}+"
    rf'"?(TIME\s+ZONE|SESSION\s+AUTHORIZATION|XML\s+OPTION|{_NAME})',
    re.IGNORECASE | re.DOTALL,
)
_SESSION = re.compile(
    rf"\b(?:SET|RESET){_GAP}+(?:SESSION{_GAP}+(?!AUTHORIZATION\b))?(?!LOCAL\b)"
    rf'"?(TIME\s+ZONE|SESSION\s+AUTHORIZATION|XML\s+OPTION|{_NAME})',
    re.IGNORECASE | re.DOTALL,
)
_SET_CONFIG = re.compile(
    rf"\bset_config{_GAP}*\({_GAP}*"
    rf"(?:'(?P<name>{_NAME})'|(?P<other>[^,]*?)),"
    r"(?:(?:[^()]|\([^()]*\))*,\s*(?P<session>false)\s*\))?",
    re.IGNORECASE | re.DOTALL,
)
_IS_NAME = re.compile(_NAME)

# Words of SET that are not the names of settings.
_WORDS = {
    "time zone": "timezone",
    "session authorization": "session_authorization",
    "schema": "search_path",
    "names": "client_encoding",
    "xml option": "xmloption",
}


def ends_transaction(text: str) -> bool:
    """Return whether a statement, or one of several in the text, ends the transaction.

    A text that begins by creating a trigger or a function is skipped, because its body has
    semicolons and its own ``END``. So a ``COMMIT`` after it is missed.
    """
    if not _ENDING.search(text):
        return False
    bare = _COMMENT_OR_LITERAL.sub(lambda found: " " if found["comment"] else "''", text)
    if _COMPOUND.match(bare):
        return False
    return any(_ENDS.match(each) for each in bare.split(";"))


def looks_read_only(text: str) -> bool:
    """Return whether the text begins like a statement that writes nothing.

    It may still write: ``SELECT`` can call a function that does.
    """
    return _READS.match(text) is not None


def changes_rows(text: str) -> bool:
    """Return whether the text begins like a statement that inserts, updates or deletes rows."""
    return _CHANGES.match(text) is not None


def writes_only_rows(text: str) -> bool:
    """Return whether a statement writes nothing but rows, which some databases count.

    That includes ``LOCK``, which writes nothing, and ``SET``, because settings are tracked: see
    :func:`session_settings`.
    """
    return changes_rows(text) or _WRITES_NOTHING_ELSE.match(text) is not None


def session_settings(text: str) -> set[str]:
    """Return the names of PostgreSQL's settings that the text sets until the session ends.

    A rollback restores them.
    """
    return _names(_SESSION.findall(text)) if _MAKES_SETTING.match(text) else set()


def local_settings(text: str, parameters: object = None) -> set[str]:
    """Return the names of PostgreSQL's settings that the text sets until the transaction ends.

    :param text: a statement, or the body of a function.
    :param parameters: the parameters of the statement; a name may be among them.
    """
    names = _names(_LOCAL.findall(text))
    for found in _SET_CONFIG.finditer(text):
        if found["session"]:
            continue
        if found["name"]:
            names.add(found["name"].lower())
            continue
        values = list(_flatten(parameters))
        if not any(value is False for value in values):
            names.update(
                value.lower()
                for value in values
                if isinstance(value, str) and _IS_NAME.fullmatch(value)
            )
    # PostgreSQL itself resets these, such as READ ONLY, at the end of a savepoint.
    return {name for name in names if not name.startswith("transaction_")}


def _names(found: list[str]) -> set[str]:
    names = {" ".join(each.lower().split()) for each in found}
    return {_WORDS.get(name, name) for name in names}


def _flatten(parameters: object) -> Iterator[object]:
    """Yield the values of one set of parameters, positional or named, or of several."""
    if isinstance(parameters, dict):
        parameters = tuple(cast("dict[str, object]", parameters).values())
    if isinstance(parameters, (list, tuple)):
        for value in cast("list[object]", parameters):
            yield from _flatten(value)
    else:
        yield parameters
