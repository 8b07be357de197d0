"""Record the connections of a pool, and the statements of a dialect, in an account.

SQLAlchemy has no event for the wait for a connection, and its events for statements cost as much
as a statement. So a watch replaces public methods on the instances: ``Pool.connect()``,
``Dialect.do_...()`` and ``Engine.dispose()``.
"""

from __future__ import annotations

import weakref
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import event, exc
from sqlalchemy.pool import QueuePool, SingletonThreadPool

from ._holder import backend_pid, either
from ._records import PoolUse

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Engine
    from sqlalchemy.pool import ConnectionPoolEntry, Pool, PoolProxiedConnection

    from ._account import Account


class WatchedPool:
    """An engine's pool, whose connections an account records.

    ``Engine.dispose()`` replaces the pool with a new one, which has the same listeners.

    :param engine: the engine.
    :param account: the account of the process.
    """

    def __init__(self, engine: Engine, account: Account) -> None:
        url = engine.url
        place = "/".join(filter(None, (url.host, url.database)))
        self.name = f"{engine.dialect.name} {place}".rstrip()
        self.timeouts = 0
        self._account = account
        self._undo: list[Callable[[], None]] = []
        self._is_shared = False
        self._released = False
        self.is_per_thread = isinstance(engine.pool, SingletonThreadPool)
        pool = engine.pool
        # Weak, so that an engine that the application has dropped is collected.
        self.dialect = weakref.ref(engine.dialect)
        self._pool: Callable[[], Pool | None] = lambda: None
        self._listen(pool)
        self.track(pool)
        dialect = engine.dialect
        self._replace(engine, "dispose", partial(self._tracked_dispose, weakref.ref(engine)))
        self._replace(dialect, "do_execute", self._timed_execute)
        self._replace(dialect, "do_executemany", self._timed_execute)
        self._replace(dialect, "do_execute_no_params", self._timed_execute_no_params)

    def track(self, pool: Pool) -> None:
        """Record the connections of this pool, which may have replaced the previous one."""
        if self._released or self._pool() is pool:
            return
        self._pool = weakref.ref(pool)
        self._replace(pool, "connect", self._tracked_connect)

    def release(self) -> None:
        """Restore what was replaced."""
        self._released = True
        while self._undo:
            self._undo.pop()()

    def _replace(self, owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
        original = getattr(owner, name)
        replaced = wrap(original)
        setattr(owner, name, replaced)
        # Weak, because `replaced` refers to its owner, and a disposed pool must be collected.
        ref, mine = weakref.ref(owner), weakref.ref(replaced)

        def undo() -> None:
            found = ref()
            # Another tool may have wrapped it since. Then it stays, but records nothing more.
            if found is not None and found.__dict__.get(name) is mine():
                delattr(found, name)

        self._undo.append(undo)

    # -- connections ------------------------------------------------------------------------------

    def _listen(self, pool: Pool) -> None:
        account = self._account
        holds, backends, sharing = account.holds, account.backends, account.sharing

        def on_connect(connection: Any, _: ConnectionPoolEntry) -> None:
            # After a fork without Python handlers, this is the first listener that runs.
            account.of_this_process()
            backends[id(connection)] = backend_pid(connection)

        def on_return(connection: Any, *_: Any) -> None:
            hold = holds.pop(id(connection), None)
            if hold is not None:
                if sharing:
                    hold = account.returned(id(connection), hold)
                hold.end()

        def on_close(connection: Any, *_: Any) -> None:
            backends.pop(id(connection), None)
            while id(connection) in holds:  # several share it, and one has invalidated it
                on_return(connection)

        self._on_return = on_return
        for name, listener in (
            ("connect", on_connect),
            ("close", on_close),
            ("close_detached", on_close),
            ("checkin", on_return),
            ("detach", on_return),  # it no longer counts against the pool's size
            ("invalidate", on_return),  # the "checkin" that follows does not have it
        ):
            self._listen_to(pool, name, listener)

    def _listen_to(self, pool: Pool, name: str, listener: Callable[..., None]) -> None:
        event.listen(pool, name, listener)
        self._undo.append(partial(_remove_listener, weakref.ref(pool), name, listener))

    def share(self) -> None:
        """Account for several holders of one connection: StaticPool."""
        pool = self._pool()
        if pool is None or self._is_shared:
            return
        self._is_shared = True
        on_return = self._on_return

        def on_reset(connection: Any, record: ConnectionPoolEntry | None, _: Any) -> None:
            # All holders share one record, so "checkin" follows only the first return.
            if record is not None and not record.in_use:
                on_return(connection)

        # Only when needed: a listener of this event slows down each return.
        self._listen_to(pool, "reset", on_reset)

    def _tracked_dispose(self, ref: weakref.ref[Engine], dispose: Callable[..., None]) -> Any:
        # A listener of "engine_disposed", like any listener of an engine, would make a SELECT cost
        # a fifth more.
        def tracked_dispose(*arguments: Any, **options: Any) -> None:
            dispose(*arguments, **options)
            engine = ref()
            assert engine is not None, "its own method runs"
            self.track(engine.pool)

        return tracked_dispose

    def _tracked_connect(self, connect: Callable[[], PoolProxiedConnection]) -> Any:
        account = self._account
        asked, got, waiting = account.asked, account.got, account.waiting

        def tracked_connect() -> PoolProxiedConnection:
            if self._released:
                return connect()
            hold = asked(self)
            waiting.add(hold)
            try:
                connection = connect()
            except exc.TimeoutError as error:
                self.timeouts += 1
                account.timed_out(hold, error)
                raise
            except BaseException:
                hold.give_up()
                raise
            finally:
                waiting.discard(hold)
            got(hold, connection)
            return connection

        return tracked_connect

    def is_gone(self) -> bool:
        """Return whether the application has dropped the engine."""
        return self.dialect() is None

    def use(self) -> PoolUse | None:
        """Return how much of the pool is in use, None if it is gone."""
        pool = self._pool()
        if pool is None:
            return None
        held = sum(hold.pool is self for hold in self._account.held())
        size = limit = None
        idle = 0
        if isinstance(pool, QueuePool):
            size, held, idle = pool.size(), pool.checkedout(), pool.checkedin()
            limit = _limit(pool)
        return PoolUse(
            name=self.name,
            kind=type(pool).__name__,
            size=size,
            limit=limit,
            checked_out=held,
            idle=idle,
            waiting=sum(hold.pool is self for hold in self._account.waiting.copy()),
            timeouts=self.timeouts,
        )

    # -- statements -------------------------------------------------------------------------------

    def _timed_execute(self, execute: Callable[..., None]) -> Any:
        holds, reads = self._account.holds, self._account.reads

        def timed_execute(
            cursor: Any, statement: str, parameters: Any, context: Any = None
        ) -> None:
            try:
                # An optional extension of PEP 249, which most cursors have: it is faster.
                hold = holds[id(cursor.connection)]
            except (AttributeError, KeyError):
                found = None
                if context is not None:
                    found = holds.get(id(context.root_connection.connection.dbapi_connection))
                if found is None:
                    execute(cursor, statement, parameters, context)
                    return
                hold = found
            hold.began = began = monotonic()
            try:
                execute(cursor, statement, parameters, context)
            finally:
                hold.last = now = monotonic()
                hold.began = 0.0
                hold.busy += now - began
                hold.statements += 1
                if statement not in reads:
                    hold.wrote = either(hold.wrote, reads.classify(statement))

        return timed_execute

    def _timed_execute_no_params(self, execute: Callable[..., None]) -> Any:
        def without(cursor: Any, statement: str, _: Any, context: Any) -> None:
            execute(cursor, statement, context)

        timed_execute = self._timed_execute(without)

        def timed_execute_no_params(cursor: Any, statement: str, context: Any = None) -> None:
            timed_execute(cursor, statement, None, context)

        return timed_execute_no_params


def _remove_listener(ref: weakref.ref[Pool], name: str, listener: Callable[..., None]) -> None:
    pool = ref()
    if pool is not None:
        event.remove(pool, name, listener)


def _limit(pool: QueuePool) -> int | None:
    # No public name has the limit: overflow() and status() return the current overflow.
    overflow: int = cast("Any", pool)._max_overflow
    return None if overflow < 0 else pool.size() + overflow
