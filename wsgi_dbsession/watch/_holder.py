"""Who holds a connection, and for how long: the running account, and what is shown of it.

``Hold`` and ``Work`` are written by the thread or greenlet that uses the connection, and read by
another while they change: a glimpse may be off by one statement, and no lock is needed.
"""

from __future__ import annotations

import contextlib
import weakref
from datetime import datetime, timezone
from time import monotonic, time
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from wsgi_dbsession._report import describe, describe_path

from ._line import show_line
from ._records import Ended, Place

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

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
    """Of a pool, an account needs to know the name."""

    name: str


class Work:
    """The account of a scope, from its first connection to its end."""

    __slots__ = (
        "attempt",
        "block",
        "busy",
        "connections",
        "ended",
        "held",
        "line",
        "outcome",
        "reason",
        "request",
        "scope",
        "statements",
        "waited",
        "wrote",
    )

    request: tuple[Any, ...] | None
    """Once it has ended: its method and path, None for a block."""

    block: str
    """Once it has ended: the name of the block."""

    ended: float
    """When it ended, in seconds since 1970; 0 before."""

    def __init__(self, scope: Scope, line: Line | None) -> None:
        # A scope that is dropped must take its Sessions along, and with them the connection.
        self.scope = weakref.ref(scope)
        self.line = line
        self.held = self.busy = self.waited = self.ended = 0.0
        self.connections = self.statements = 0
        self.wrote: bool | None = False

    def end(self, scope: Scope) -> None:
        """Take down what can be known until the scope ends."""
        self.outcome = scope.outcome
        self.reason = scope.reason
        environ = scope.environ
        # Not the environ itself: it refers to the scope and to the framework's objects.
        if environ is None:
            self.request, self.block, found = None, scope.name, scope.info
        else:
            self.request, self.block, found = _request(environ), "", environ
        self.attempt = found.get("wsgi_dbsession.attempt", 1)
        self.ended = time()

    def names(self) -> Names:
        """Return what the scope is called."""
        if self.ended:
            request, block = self.request, self.block
        else:
            scope = self.scope()
            if scope is None:
                return Names(None, None, "a scope that was dropped")
            request = _request(scope.environ)
            block = scope.name if request is None else ""
        if request is None:
            return Names(None, None, block)
        method, script, path = request
        environ = {"REQUEST_METHOD": method, "SCRIPT_NAME": script, "PATH_INFO": path}
        name, path = describe(environ), describe_path(environ)
        return Names(name[: -len(path) - 1], path, name)

    def show(self) -> Ended:
        """Return what can be shown of it, once it has ended."""
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


class Spot:
    """The account of all scopes that first asked at one line."""

    __slots__ = ("longest", "scopes", "total")

    def __init__(self, work: Work) -> None:
        self.longest = work
        self.scopes = 1
        self.total = work.held

    def add(self, work: Work) -> None:
        """Count one more."""
        self.scopes += 1
        held = work.held
        self.total += held
        if held > self.longest.held:
            self.longest = work

    def show(self) -> Place:
        """Return what can be shown of it."""
        return Place(
            line=show_line(self.longest.line),
            name=self.longest.names().name,
            scopes=self.scopes,
            longest_s=self.longest.held,
            total_s=self.total,
        )


class Hold:
    """The account of one connection, from the moment it is asked for until it is returned."""

    __slots__ = (
        "asked",
        "began",
        "busy",
        "here",
        "last",
        "line",
        "pool",
        "since",
        "statements",
        "work",
        "wrote",
    )

    since: float
    """When the connection was there."""

    began: float
    """When the statement began that runs, 0 if none does."""

    last: float
    """When the last statement ended, or the connection was there."""

    def __init__(self, pool: AnyPool, work: Work | None, line: Line | None, here: Here) -> None:
        self.pool = pool
        self.work = work
        self.line = line
        self.here = here
        self.began = self.busy = 0.0
        self.statements = 0
        self.wrote: bool | None = False
        self.asked = monotonic()

    def give_up(self) -> float:
        """Count the time of a wait that timed out, and return it."""
        waited = monotonic() - self.asked
        if self.work is not None:
            self.work.waited += waited
        return waited

    def end(self) -> None:
        """Add it to the account of its scope, unless that has ended: it is returned."""
        work = self.work
        if work is not None and not work.ended:
            work.held += monotonic() - self.since
            work.busy += self.busy
            work.statements += self.statements
            wrote = self.wrote
            if wrote is not False:
                work.wrote = either(work.wrote, wrote)

    def names(self) -> Names:
        """Return who this is."""
        return NO_SCOPE if self.work is None else self.work.names()

    def idle(self, now: float) -> float:
        """Return for how many seconds no statement has run."""
        return 0.0 if self.began else now - self.last

    def is_left_over(self) -> bool:
        """Return whether its scope has ended, or was dropped."""
        return self.work is not None and (self.work.ended > 0 or self.work.scope() is None)

    def is_between_steps(self) -> bool:
        """Return whether its response waits for the server to ask for the next block."""
        scope = None if self.work is None else self.work.scope()
        return scope is not None and not scope.in_step

    def idle_share(self, now: float) -> float:
        """Return the share of the time in which no statement ran."""
        held = now - self.since
        began = self.began
        busy = self.busy + (now - began if began else 0.0)
        return min(1.0, max(0.0, 1 - busy / held)) if held > 0 else 0.0


def _request(environ: WSGIEnvironment | None) -> tuple[Any, ...] | None:
    if environ is None:
        return None
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
