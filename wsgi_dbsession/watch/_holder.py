"""Who holds a connection, and for how long.

The thread or greenlet that uses the connection writes to its ``Hold``, while another one may read
it. There is no lock, so a reader may be off by one statement.
"""

from __future__ import annotations

import contextlib
from copy import copy
from datetime import datetime, timezone
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from wsgi_dbsession._report import describe, describe_path

from ._line import show_line
from ._records import Ended, Place

if TYPE_CHECKING:
    import weakref

    from _typeshed.wsgi import WSGIEnvironment

    from wsgi_dbsession._observed import Outcome, Reason
    from wsgi_dbsession._scope import Scope

    from ._line import Line
    from ._threads import Ident


class Names(NamedTuple):
    """The method, path and name of a scope."""

    method: str | None
    path: str | None
    name: str


NO_SCOPE = Names(None, None, "outside of a scope")


class AnyPool(Protocol):
    """The attributes of a ``WatchedPool`` that an account uses."""

    name: str

    is_per_thread: bool
    """Whether the pool gives a thread the connection that it already holds."""

    def share(self) -> None:
        """Account for several holders of one connection."""


class Hold:
    """The account of one connection, from before its checkout until its return.

    The account of a scope's first connection is that of the scope, too.
    """

    __slots__ = (
        "asked",
        "attempt",
        "began",
        "busy",
        "called",
        "connections",
        "ended",
        "first",
        "held",
        "ident",
        "last",
        "line",
        "more",
        "outcome",
        "pool",
        "reason",
        "scope",
        "since",
        "statements",
        "waited",
        "wrote",
    )

    since: float
    """When the pool returned the connection; 0 before."""

    began: float
    """When the current statement began; 0 if none is running."""

    last: float
    """When the last statement ended. Before the first one, the same as ``since``."""

    held: float
    """For how long the connection was held; 0 until its return."""

    first: Hold | None
    """The account of its scope, if that is another account."""

    more: Hold | None
    """The sum of the scope's other connections that were returned."""

    ended: float
    """When the scope ended, in seconds since 1970; 0 before."""

    called: tuple[Any, ...] | str
    """The method and path of the ended request, or the name of the ended block."""

    outcome: Outcome | None
    reason: Reason | None
    attempt: int

    def __init__(
        self,
        pool: AnyPool,
        scope: weakref.ref[Scope] | None,
        first: Hold | None,
        line: Line | None,
        ident: Ident,
    ) -> None:
        self.pool = pool
        self.scope = scope  # weak, so that a dropped scope and its Sessions are collected
        self.first = first
        self.line = line
        self.ident = ident
        self.more = None
        self.since = self.began = self.busy = self.held = self.waited = self.ended = 0.0
        self.connections = self.statements = 0
        self.wrote: bool | None = False
        self.asked = monotonic()

    def give_up(self) -> float:
        """Record and return the time of a checkout that failed."""
        self.waited = waited = monotonic() - self.asked
        if self.first is not None:
            self._add_to(self.first)
        return waited

    def end(self) -> None:
        """Stop counting, because the connection was returned."""
        self.held = monotonic() - self.since
        if self.first is not None:
            self._add_to(self.first)

    def _add_to(self, first: Hold) -> None:
        if not first.ended:
            if first.more is not None:
                self._add(first.more)
            self.first = None  # otherwise a reference cycle
            first.more = self

    def _add(self, other: Hold) -> None:
        self.held += other.held
        self.busy += other.busy
        self.waited += other.waited
        self.connections += other.connections
        self.statements += other.statements
        self.wrote = either(self.wrote, other.wrote)

    def total(self) -> Hold:
        """Return the sum of all connections of its scope.

        It is a copy, because this account continues if its connection is left over.
        """
        total = copy(self)
        if self.since and not self.held:
            total.held = monotonic() - self.since
        if self.more is not None:
            total._add(self.more)
        return total

    def names(self) -> Names:
        """Return the names of its scope."""
        if self.scope is None:
            return NO_SCOPE
        account = self.first or self
        if account.ended:
            called = account.called
        else:
            scope = self.scope()
            if scope is None:
                return Names(None, None, "a scope that was dropped")
            called = scope.name if scope.environ is None else name_of_request(scope.environ)
        if isinstance(called, str):
            return Names(None, None, called)
        method, script, path = called
        environ = {"REQUEST_METHOD": method, "SCRIPT_NAME": script, "PATH_INFO": path}
        name, path = describe(environ), describe_path(environ)
        return Names(name[: -len(path) - 1], path, name)

    def show(self) -> Ended:
        """Return the record of its scope, which has ended."""
        return Ended(
            **self.names()._asdict(),
            ended=datetime.fromtimestamp(self.ended, timezone.utc),
            held_s=self.held,
            in_statements_s=self.busy,
            waited_s=self.waited,
            connections=self.connections,
            statements=self.statements,
            wrote=self.wrote,
            outcome=self.outcome,
            reason=self.reason,
            attempt=self.attempt,
            line=show_line(self.line),
        )

    def is_left_over(self) -> bool:
        """Return whether its scope has ended, or was dropped."""
        if self.scope is None:
            return False
        return (self.first or self).ended > 0 or self.scope() is None

    def is_between_steps(self) -> bool:
        """Return whether its response waits until the server requests the next block."""
        scope = None if self.scope is None else self.scope()
        return scope is not None and not scope.in_step

    def idle_share(self, now: float) -> float:
        """Return the share of the time in which no statement ran."""
        held = now - self.since
        began = self.began
        busy = self.busy + (now - began if began else 0.0)
        return min(1.0, max(0.0, 1 - busy / held)) if held > 0 else 0.0


class Spot:
    """The account of all scopes that asked for their first connection at one line."""

    __slots__ = ("longest", "scopes", "total")

    def __init__(self, hold: Hold) -> None:
        self.longest = hold
        self.scopes = 1
        self.total = hold.held

    def show(self) -> Place:
        """Return the record of the line."""
        return Place(
            line=show_line(self.longest.line),
            name=self.longest.names().name,
            scopes=self.scopes,
            longest_s=self.longest.held,
            total_s=self.total,
        )


def name_of_request(environ: WSGIEnvironment) -> tuple[Any, ...]:
    """Return method, script name and path of a request, as the server has set them."""
    get = environ.get
    return get("REQUEST_METHOD", "?"), get("SCRIPT_NAME", ""), get("PATH_INFO", "")


def either(one: bool | None, other: bool | None) -> bool | None:
    """Return whether one of two is true; None if that is unknown."""
    if one or other:
        return True
    return None if None in (one, other) else False


def backend_pid(connection: Any) -> int | None:
    """Return the ID of the database's process or thread that serves a driver's connection.

    :return: None if the driver does not store it: no query is sent.
    """
    with contextlib.suppress(Exception):
        info = getattr(connection, "info", None)
        found = getattr(info, "backend_pid", None)  # psycopg, psycopg2
        if found is None:
            found = getattr(connection, "connection_id", None)  # mysql-connector
        if found is None:
            found = connection.thread_id()  # PyMySQL, mysqlclient
        return found if isinstance(found, int) else None
    return None
