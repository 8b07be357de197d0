"""The requests that the clients send, and how often each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.soak.clients import Shape

if TYPE_CHECKING:
    from tests.servers.fleet import Server
    from tests.soak.databases import Database

#: the views that are wrong, or that say no: none of these succeeds on PostgreSQL
ALWAYS_REFUSED = frozenset(
    {
        *("swallowed error", "closed Session", "late flush", "deferred constraint"),
        *("veto", "error", "doom"),
    }
)

SHAPES = [
    Shape("plain", "list", "transfer", 8),
    Shape("plain", "sized", "transfer", 5),
    Shape("plain", "unsized", "transfer", 5),
    Shape("plain", "write", "transfer", 4),
    Shape("plain", "list", "transfer", 3, "1.0"),
    Shape("plain", "sized", "transfer", 2, "1.0"),
    Shape("plain", "write", "transfer", 1, "1.0"),
    Shape("plain", "list", "savepoints", 3),
    Shape("plain", "sized", "savepoints", 2),
    Shape("plain", "unsized", "savepoints", 1),
    Shape("plain", "list", "inner block", 3),
    Shape("plain", "unsized", "inner block", 1),
    Shape("plain", "list", "two registries", 4),
    Shape("plain", "sized", "two registries", 2),
    Shape("plain", "list", "swallowed error", 1),
    Shape("plain", "sized", "swallowed error", 1),
    Shape("plain", "unsized", "swallowed error", 1),
    Shape("plain", "list", "closed Session", 1),
    Shape("plain", "sized", "closed Session", 1),
    Shape("plain", "write", "closed Session", 1),
    Shape("plain", "list", "deferred constraint", 1),
    Shape("plain", "sized", "deferred constraint", 1),
    Shape("plain", "unsized", "deferred constraint", 1),
    Shape("plain", "write", "deferred constraint", 1),
    Shape("plain", "list", "late flush", 1),
    Shape("plain", "unsized", "late flush", 1),
    Shape("plain", "list", "veto", 1),
    Shape("plain", "list", "error", 1),
    Shape("plain", "unsized", "error", 1),
    Shape("plain", "list", "doom", 1),
    Shape("headers", "late", "transfer", 4),
    # Without chunks an unsized body that was cut looks whole: only this moment is safe.
    Shape("headers", "late", "transfer", 2, "1.0"),
    Shape("headers", "late", "two registries", 1),
    Shape("headers", "late", "deferred constraint", 1),
    Shape("answered", "list", "transfer", 3),
    Shape("answered", "list", "late flush", 1),
    Shape("answered", "sized", "deferred constraint", 1),
    Shape("retry", "list", "transfer", 6),
    Shape("retry", "sized", "transfer", 2),
    Shape("retry", "unsized", "transfer", 2),
    Shape("retry", "list", "savepoints", 1),
    Shape("retry", "list", "two registries", 1),
    Shape("keys", "list", "transfer", 6, repeats=True),
    Shape("keys", "sized", "transfer", 2, repeats=True),
    Shape("keys", "unsized", "transfer", 2, repeats=True),
    Shape("keys", "list", "savepoints", 2, repeats=True),
    Shape("two-phase", "list", "two registries", 4),
    Shape("two-phase", "sized", "two registries", 2),
    Shape("two-phase", "unsized", "two registries", 2),
]


def shapes(server: Server, database: Database) -> list[Shape]:
    """Return those that a server and a database can have."""
    return [
        each
        for each in SHAPES
        if (server.writes or each.body != "write")
        and each.mount not in database.lacks
        and each.work not in database.lacks
    ]
