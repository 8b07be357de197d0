"""Who holds a connection, and for how long: the running account, and what is shown of it.

A ``Hold`` is written by the thread or greenlet that uses the connection, and read by another
while it changes: a glimpse may be off by one statement, and no lock is needed.
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

    from ._here import Here
    from ._line import Line


class Names(NamedTuple):
    """What a scope is called."""

    method: str | None
    path: str | None
    name: str


NO_SCOPE = Names(None, None, "outside of a scope")


class AnyPool(Protocol):
    """What an account needs to know of a pool."""

    name: str

    is_per_thread: bool
    """Whether a thread gets again what it holds."""

    def share(self) -> None:
        """Expect that one connection has several holders."""


class Hold:
    """The account of one connection, from the moment it is asked for until it is returned.

    That of a scope's first connection is the account of the scope, too.
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
        "here",
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
    """When the connection was there, 0 before."""

    began: float
    """When the statement began that runs, 0 if none does."""

    last: float
    """When the last statement ended, or the connection was there."""

    held: float
    """For how long it was held, 0 before it is returned."""

    first: Hold | None
    """The account of its scope, if that is another one."""

    more: Hold | None
    """The scope's other connections that were returned, added up."""

    ended: float
    """When the scope ended, in seconds since 1970; 0 before."""

    called: tuple[Any, ...] | str
    """Once the scope has ended: its method and path, for a block its name."""

    outcome: Outcome | None
    reason: Reason | None
    attempt: int

    def __init__(
        self,
        pool: AnyPool,
        scope: weakref.ref[Scope] | None,
        first: Hold | None,
        line: Line | None,
        here: Here,
    ) -> None:
        self.pool = pool
        self.scope = scope  # weak: one that is dropped must take its Sessions along
        self.first = first
        self.line = line
        self.here = here
        self.more = None
        self.since = self.began = self.busy = self.held = self.waited = self.ended = 0.0
        self.connections = self.statements = 0
        self.wrote: bool | None = False
        self.asked = monotonic()

    def give_up(self) -> float:
        """Count the time of a wait that failed, and return it."""
        self.waited = waited = monotonic() - self.asked
        if self.first is not None:
            self._add_to(self.first)
        return waited

    def end(self) -> None:
        """Stop counting, because the connection is returned."""
        self.held = monotonic() - self.since
        if self.first is not None:
            self._add_to(self.first)

    def _add_to(self, first: Hold) -> None:
        if not first.ended:
            if first.more is not None:
                self._add(first.more)
            self.first = None  # a cycle, otherwise
            first.more = self

    def _add(self, other: Hold) -> None:
        self.held += other.held
        self.busy += other.busy
        self.waited += other.waited
        self.connections += other.connections
        self.statements += other.statements
        self.wrote = either(self.wrote, other.wrote)

    def total(self) -> Hold:
        """Return a copy to which all connections of its scope are added.

        A copy, because its own connection may be left over, and in use.
        """
        total = copy(self)
        if self.since and not self.held:
            total.held = monotonic() - self.since
        if self.more is not None:
            total._add(self.more)
        return total

    def names(self) -> Names:
        """Return what its scope is called."""
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
        """Return what can be shown of its scope, once that has ended."""
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
        """Return whether its response waits for the server to ask for the next block."""
        scope = None if self.scope is None else self.scope()
        return scope is not None and not scope.in_step

    def idle_share(self, now: float) -> float:
        """Return the share of the time in which no statement ran."""
        held = now - self.since
        began = self.began
        busy = self.busy + (now - began if began else 0.0)
        return min(1.0, max(0.0, 1 - busy / held)) if held > 0 else 0.0


class Spot:
    """The account of all scopes that first asked at one line."""

    __slots__ = ("longest", "scopes", "total")

    def __init__(self, hold: Hold) -> None:
        self.longest = hold
        self.scopes = 1
        self.total = hold.held

    def show(self) -> Place:
        """Return what can be shown of it."""
        return Place(
            line=show_line(self.longest.line),
            name=self.longest.names().name,
            scopes=self.scopes,
            longest_s=self.longest.held,
            total_s=self.total,
        )


def name_of_request(environ: WSGIEnvironment) -> tuple[Any, ...]:
    """Return method and path of a request, as the server gave them."""
    get = environ.get
    return get("REQUEST_METHOD", "?"), get("SCRIPT_NAME", ""), get("PATH_INFO", "")


def either(one: bool | None, other: bool | None) -> bool | None:
    """Return whether one of two is true; None if that is unknown."""
    if one or other:
        return True
    return None if None in (one, other) else False


def backend_pid(connection: Any) -> int | None:
    """Return the number of the database's process or thread that serves a driver's connection.

    Only what the driver knows by itself: nothing is sent.
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
