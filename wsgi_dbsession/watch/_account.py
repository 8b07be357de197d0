"""The account of a process: who holds a connection, who waits, and what has ended.

A connection may be returned at any point, even in the midst of a garbage collection. So the code
that runs then takes no lock: it adds to dictionaries and removes from them, which is atomic.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from datetime import datetime, timezone
from os import getpid
from time import monotonic, time
from typing import TYPE_CHECKING, Any

from wsgi_dbsession._report import add_note, log
from wsgi_dbsession._step import active_step

from ._holder import Hold, Spot, name_of_request
from ._line import LineFinder, show_line
from ._show import describe
from ._statement import Reads
from ._threads import find_get_ident, thread_frames

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import exc
    from sqlalchemy.pool import PoolProxiedConnection

    from wsgi_dbsession._scope import Scope

    from ._guard import Guard
    from ._holder import AnyPool
    from ._records import Ended, Place
    from ._threads import Ident

_LAST = 100  # ended scopes
_MOST_SPOTS = 500
_MOST_NAMED = 50  # holders in one error
_MOST_SHARING = 50  # holders of one connection


class Account:
    """The records of a watch in this process.

    :param key: the account's key in a scope's ``info``.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.callbacks: tuple[Callable[[Ended], object], ...] = ()
        self.guard: Guard | None = None
        self._calling: set[Ident] = set()  # threads that run callbacks
        # By id of the driver's connection: its last user, others that share it, its backend.
        self.holds: dict[int, Hold] = {}
        self.sharing: dict[int, tuple[Hold, ...]] = {}
        self.backends: dict[int, int | None] = {}
        self.waiting: set[Hold] = set()
        self.reads = Reads()
        self.last: deque[Hold] = deque(maxlen=_LAST)
        self.spots: dict[tuple[int, int] | None, Spot] = {}
        self.reset()

    def reset(self) -> None:
        """Reset everything, as in a process that has just started."""
        self.pid = getpid()
        self.started = datetime.now(timezone.utc)
        self.lock = threading.Lock()
        self.retries = 0
        self._find_line = LineFinder().find
        self._get_ident: Callable[[], Ident] | None = None
        # Cleared, not replaced: listeners refer to these objects.
        self.forget_holders()
        for each in (self._calling, self.backends, self.waiting, self.last, self.spots):
            each.clear()
        if self.guard is not None:
            self.guard.reset()

    def of_this_process(self) -> Account:
        """Return the account, after a reset if the fork ran no Python handlers, as in uWSGI."""
        if self.pid != getpid():
            self.reset()
        return self

    def forget_holders(self) -> None:
        """Forget who holds a connection."""
        self.holds.clear()
        self.sharing.clear()

    def held(self) -> list[Hold]:
        """Return the holders, the one with the longest time first."""
        return sorted(self.holds.copy().values(), key=lambda hold: hold.since)

    # -- connections ------------------------------------------------------------------------------

    def asked(self, pool: AnyPool) -> Hold:
        """Open the account of a connection before its checkout."""
        line = self._find_line()
        get_ident = self._get_ident
        if get_ident is None:
            get_ident = self._get_ident = find_get_ident()
        scope: Scope | None = active_step()
        if scope is None:
            return Hold(pool, None, None, line, get_ident())
        info = scope.info
        first: Hold | None = info.get(self.key)
        if first is not None:
            return Hold(pool, first.scope, first, line, get_ident())
        hold = info[self.key] = Hold(pool, weakref.ref(scope), None, line, get_ident())
        return hold

    def got(self, hold: Hold, connection: PoolProxiedConnection) -> None:
        """Start counting, because the pool has returned a connection."""
        key = id(connection.dbapi_connection)
        if key in self.holds:
            if hold.pool.is_per_thread:
                return
            hold.pool.share()
            users = (*self.sharing.get(key, ()), self.holds[key])
            self.sharing[key] = users[-_MOST_SHARING:]
        self.holds[key] = hold
        hold.since = hold.last = now = monotonic()
        hold.waited = now - hold.asked
        hold.connections = 1
        guard = self.guard
        if guard is not None and guard.pid != getpid():
            guard.start()

    def returned(self, key: int, hold: Hold) -> Hold:
        """Restore the other holders of a connection that several share, as with StaticPool.

        :param hold: the account of its last user.
        :return: the account to end, which is the last one of this thread.
        """
        users = (*self.sharing.pop(key, ()), hold)
        ident = find_get_ident()()
        ended = next((each for each in reversed(users) if each.ident == ident), hold)
        others = [each for each in users if each is not ended]
        if others:
            self.holds[key] = others.pop()
        if others:
            self.sharing[key] = tuple(others)
        return ended

    def timed_out(self, hold: Hold, error: exc.TimeoutError) -> None:
        """Add the holders to the error, and log them."""
        now, waited = monotonic(), hold.give_up()
        holders = [each for each in self.held() if each.pool is hold.pool]
        frames = thread_frames()
        named = [describe(each, now, frames) for each in holders[:_MOST_NAMED]]
        if len(holders) > _MOST_NAMED:
            named.append(f"and {len(holders) - _MOST_NAMED} more")
        if not named:
            named = ["unknown holders, which asked before the watch began"]
        add_note(error, "\n  ".join([f"The connections of {hold.pool.name} are held by", *named]))
        name, line = hold.names().name, show_line(hold.line)
        log.error(
            "pool exhausted: %s waited %.1f s for %s at %s; held by %s",
            name,
            waited,
            hold.pool.name,
            line,
            "; ".join(named),
            extra={"scope": name, "line": line, "holders": named},
        )

    # -- scopes -----------------------------------------------------------------------------------

    def close(self, hold: Hold, scope: Scope) -> None:
        """Close the account of a scope."""
        hold.outcome = scope.outcome
        hold.reason = scope.reason
        environ = scope.environ
        # Not the environ itself, which refers to the scope and to the framework's objects.
        hold.called = scope.name if environ is None else name_of_request(environ)
        hold.attempt = (environ or scope.info).get("wsgi_dbsession.attempt", 1)
        hold.ended = time()
        total = hold if hold.held and hold.more is None else hold.total()
        if not total.connections and not total.waited:
            return  # SingletonThreadPool: an outer scope already had the connection
        self.last.append(total)
        line = total.line
        # The id, because a code object is slow to hash. The spot keeps it alive.
        key = None if line is None else (id(line[0]), line[1])
        spot = self.spots.get(key)
        if spot is None:
            self._open_spot(key, total)
        else:
            spot.scopes += 1
            spot.total += total.held
            if total.held > spot.longest.held:
                spot.longest = total
        if total.attempt > 1:
            with self.lock:
                self.retries += 1
        if self.callbacks:
            self._call_back(total)

    def _call_back(self, hold: Hold) -> None:
        ident = find_get_ident()()
        if ident in self._calling:  # the scope is of a callback
            return
        self._calling.add(ident)
        try:
            for callback in self.callbacks:
                try:
                    callback(hold.show())
                except Exception:
                    log.exception("on_end callback failed: %r", callback)
        finally:
            self._calling.discard(ident)

    def _open_spot(self, key: tuple[int, int] | None, hold: Hold) -> None:
        with self.lock:
            if len(self.spots) >= _MOST_SPOTS:
                del self.spots[min(self.spots.items(), key=_longest)[0]]
            self.spots[key] = Spot(hold)

    def show_ended(self) -> list[Ended]:
        """Return the last scopes that have ended, the last one first."""
        return [hold.show() for hold in reversed(list(self.last))]

    def show_places(self) -> list[Place]:
        """Return the lines at which scopes first asked, the one with the longest time first."""
        with self.lock:
            spots = sorted(self.spots.values(), key=lambda spot: -spot.longest.held)
        return [spot.show() for spot in spots]


def _longest(item: tuple[Any, Spot]) -> float:
    return item[1].longest.held
