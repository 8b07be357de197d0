"""What the text of a statement tells about it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import Iterator

# Unambiguous, or a text with many comments would take exponential time.
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
    r"(?:SELECT|SHOW|EXPLAIN|VALUES|TABLE|WITH|SET\s+LOCAL|PRAGMA(?![^;]*=))\b",
    re.IGNORECASE | re.DOTALL,
)

_NAME = r"[A-Za-z_][\w$]*(?:\.[A-Za-z_][\w$]*)*"
_LOCAL = re.compile(
    rf"\bSET{_GAP}+LOCAL{_GAP}+"
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

    A body between ``BEGIN`` and ``END`` is not looked into, so a ``COMMIT`` after one is missed.
    """
    if not _ENDING.search(text):
        return False
    bare = _COMMENT_OR_LITERAL.sub(lambda found: " " if found["comment"] else "''", text)
    if _COMPOUND.match(bare):
        return False
    return any(_ENDS.match(each) for each in bare.split(";"))


def looks_read_only(text: str) -> bool:
    """Return whether the text begins like a statement that writes nothing.

    It may write all the same: ``SELECT`` can call a function that does.
    """
    return _READS.match(text) is not None


def local_settings(text: str, parameters: object = None) -> set[str]:
    """Return the names of PostgreSQL's settings that the text sets until the transaction ends.

    :param text: a statement, or the body of a function.
    :param parameters: those of the statement; a name may be among them.
    """
    names = {" ".join(found.lower().split()) for found in _LOCAL.findall(text)}
    names = {_WORDS.get(name, name) for name in names}
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
    # PostgreSQL itself resets those of a transaction, such as READ ONLY, with the savepoint.
    return {name for name in names if not name.startswith("transaction_")}


def _flatten(parameters: object) -> Iterator[object]:
    """Yield the values of one set of parameters, positional or named, or of several."""
    if isinstance(parameters, dict):
        parameters = tuple(cast("dict[str, object]", parameters).values())
    if isinstance(parameters, (list, tuple)):
        for value in cast("list[object]", parameters):
            yield from _flatten(value)
    else:
        yield parameters
