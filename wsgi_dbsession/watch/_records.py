"""What a watch returns: who holds, who waits, what has ended, and how much of a pool is in use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from datetime import datetime

State = Literal["running", "idle", "overdue", "left over"]


@dataclass(frozen=True)
class Holder:
    """Who holds a connection right now."""

    name: str
    """``"POST /notes"``, the name of a ``session_scope`` block, or "outside of a scope".
    "a scope that was dropped" ended without ``close()``, as a forgotten response does."""

    method: str | None
    """The method of the request; None for a block, and outside of a scope."""

    path: str | None
    """The path of the request, without its query; None likewise."""

    state: State
    """"running": in a statement, a fetch of its rows, or a COMMIT. "idle": between statements.
    "overdue": idle for longer than ``warn_after``. "left over": its scope has ended, but the
    connection was not returned."""

    since: datetime
    """When it got the connection."""

    held_s: float
    """For how many seconds it has had it."""

    idle_s: float
    """For how many seconds the database has had nothing to do for it."""

    idle_share: float
    """The share of the time in which it ran no statement, from 0 to 1. Fetches count as idle."""

    statements: int
    """How many statements it has run on this connection."""

    wrote: bool | None
    """Whether one of them was an INSERT, UPDATE, DELETE or the like; None if that is unknown."""

    backend_pid: int | None
    """The number of the database's process or thread, where the driver tells it."""

    thread: str
    """The thread or greenlet that asked for it."""

    line: str
    """The line of the application that first asked for it."""

    now: str | None
    """Where that thread or greenlet is now, where Python tells it: "at ...", or "between two
    blocks of the response"."""

    pool: str
    """The pool that the connection belongs to."""


@dataclass(frozen=True)
class Waiter:
    """Who waits for a connection right now."""

    name: str
    method: str | None
    path: str | None
    since: datetime
    waited_s: float
    thread: str
    line: str
    pool: str


@dataclass(frozen=True)
class Ended:
    """A scope that has ended, and what it did with its connections."""

    name: str
    method: str | None
    path: str | None
    ended: datetime
    held_s: float
    """For how many seconds it held a connection, those of several added up."""

    in_statements_s: float
    """For how many of these it ran statements, without fetches and COMMIT."""

    waited_s: float
    """For how many seconds it waited for the pool, or for the database to accept it."""

    connections: int
    """How often it got a connection."""

    statements: int
    wrote: bool | None
    outcome: str | None
    reason: str | None
    attempt: int
    """Which attempt at the request it was, from 1; see :mod:`wsgi_dbsession.retry`."""

    line: str
    """The line of the application that first asked for a connection."""


@dataclass(frozen=True)
class Place:
    """What scopes that first asked at one line have done, all together."""

    line: str
    name: str
    """The scope that held a connection for the longest time."""

    scopes: int
    longest_s: float
    total_s: float


@dataclass(frozen=True)
class PoolUse:
    """A pool, and how much of it is in use."""

    name: str
    """Dialect, host and database."""

    kind: str
    """The class of the pool."""

    size: int | None
    """How many connections it keeps; None if it does not count."""

    limit: int | None
    """How many connections it opens at most; None if there is no limit."""

    checked_out: int
    idle: int
    waiting: int
    timeouts: int
    """How often a wait for it timed out."""
