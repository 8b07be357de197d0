"""What a watch returns: the records of holders, waiters, ended scopes, lines and pools."""

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
    "a scope that was dropped" is, for example, that of a response that was never closed."""

    method: str | None
    """The method of the request; None for a block, and outside of a scope."""

    path: str | None
    """The path of the request, without its query; None for a block, and outside of a scope."""

    state: State
    """"running": in a statement, a fetch of its rows, a COMMIT or a ROLLBACK. "idle": between
    statements. "overdue": idle for longer than ``warn_after``. "left over": its scope has ended,
    but the connection was not returned."""

    since: datetime
    """When the pool returned the connection."""

    held_s: float
    """For how many seconds it has held the connection."""

    idle_s: float
    """For how many seconds the database has not worked for it; 0 while it is running."""

    idle_share: float
    """The share of the time without a statement, from 0 to 1. Fetches count as idle."""

    statements: int
    """How many statements it has run on this connection."""

    wrote: bool | None
    """Whether one of them was an INSERT, UPDATE, DELETE or the like; None if that is unknown."""

    backend_pid: int | None
    """The ID of the database's process or thread; None if the driver does not have it."""

    thread: str
    """The thread or greenlet that asked for it."""

    line: str
    """The line of the application that asked for it."""

    now: str | None
    """What that thread or greenlet is doing: "at ..." with the line, or "between two blocks of the
    response". None if unknown."""

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
    """For how many seconds it held connections, added up."""

    in_statements_s: float
    """For how many of these seconds it ran statements, without fetches and COMMIT."""

    waited_s: float
    """For how many seconds it waited for the pool, or for a new connection to open."""

    connections: int
    """How many connections it got."""

    statements: int
    wrote: bool | None
    outcome: str | None
    reason: str | None
    attempt: int
    """Which attempt at the request it was, from 1; see :mod:`wsgi_dbsession.retry`."""

    line: str
    """The line of the application that asked for the first connection."""


@dataclass(frozen=True)
class Place:
    """A line of the application, and the scopes that asked for their first connection there."""

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
    """How many connections it keeps open; None if it is not a ``QueuePool``."""

    limit: int | None
    """How many connections it opens at most; None if there is no limit, or no ``QueuePool``."""

    checked_out: int
    idle: int
    waiting: int
    timeouts: int
    """How many waits for a connection have timed out."""
