"""What a pool and a dialect do is told to an account: connections and statements.

SQLAlchemy has an event for a connection that is returned, but none for one that is waited for,
and its events for statements cost a request as much as a statement does. So the methods
``Pool.connect()``, ``Dialect.do_...()`` and ``Engine.dispose()``, which are public, are replaced
on the instance.
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
    """An engine's pool whose connections are accounted for.

    ``Engine.dispose()`` makes a new one, with the same events, which takes the place of the old.

    :param engine: the engine.
    :param account: that of the process.
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
        # Weak, because an engine that the application has dropped has to go.
        self.dialect = weakref.ref(engine.dialect)
        self._pool: Callable[[], Pool | None] = lambda: None
        self._listen(pool)
        self.take(pool)
        dialect = engine.dialect
        self._replace(engine, "dispose", partial(self._taking_dispose, weakref.ref(engine)))
        self._replace(dialect, "do_execute", self._timed_execute)
        self._replace(dialect, "do_executemany", self._timed_execute)
        self._replace(dialect, "do_execute_no_params", self._timed_execute_no_params)

    def take(self, pool: Pool) -> None:
        """Account for this pool's connections: the first one, or one that took its place."""
        if self._released or self._pool() is pool:
            return
        self._pool = weakref.ref(pool)
        self._replace(pool, "connect", self._accounted_connect)

    def release(self) -> None:
        """Restore what was replaced."""
        self._released = True
        while self._undo:
            self._undo.pop()()

    def _replace(self, owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
        original = getattr(owner, name)
        replaced = wrap(original)
        setattr(owner, name, replaced)
        # Weak, because it refers to its owner, and a pool that was disposed of has to go.
        ref, mine = weakref.ref(owner), weakref.ref(replaced)

        def undo() -> None:
            found = ref()
            # A wrapper that was put around it since keeps it in use: then it only passes on.
            if found is not None and found.__dict__.get(name) is mine():
                delattr(found, name)

        self._undo.append(undo)

    # -- connections ------------------------------------------------------------------------------

    def _listen(self, pool: Pool) -> None:
        account = self._account
        holds, backends, beneath = account.holds, account.backends, account.beneath

        def on_connect(connection: Any, _: ConnectionPoolEntry) -> None:
            # A child of a fork opens connections of its own before it gets one.
            account.of_this_process()
            backends[id(connection)] = backend_pid(connection)

        def on_return(connection: Any, *_: Any) -> None:
            hold = holds.pop(id(connection), None)
            if hold is not None:
                if beneath:
                    hold = account.returned(id(connection), hold)
                hold.end()

        def on_close(connection: Any, *_: Any) -> None:
            backends.pop(id(connection), None)
            while id(connection) in holds:  # others share it, and one has invalidated it
                on_return(connection)

        self._on_return = on_return
        for name, listener in (
            ("connect", on_connect),
            ("close", on_close),
            ("close_detached", on_close),
            ("checkin", on_return),
            ("detach", on_return),  # it is the application's now, and the pool has room again
            ("invalidate", on_return),  # "checkin" follows without the connection
        ):
            self._listen_to(pool, name, listener)

    def _listen_to(self, pool: Pool, name: str, listener: Callable[..., None]) -> None:
        event.listen(pool, name, listener)
        self._undo.append(partial(_forget, weakref.ref(pool), name, listener))

    def share(self) -> None:
        """Expect that one connection has several holders: StaticPool."""
        pool = self._pool()
        if pool is None or self._is_shared:
            return
        self._is_shared = True
        on_return = self._on_return

        def on_reset(connection: Any, record: ConnectionPoolEntry | None, _: Any) -> None:
            # All holders have one record, so only the first return is followed by "checkin".
            if record is not None and not record.in_use:
                on_return(connection)

        # Not before it is needed: with this event, each return costs more.
        self._listen_to(pool, "reset", on_reset)

    def _taking_dispose(self, ref: weakref.ref[Engine], dispose: Callable[..., None]) -> Any:
        # With the event "engine_disposed", as with each event of an engine, a SELECT would cost a
        # fifth more.
        def taking_dispose(*arguments: Any, **options: Any) -> None:
            dispose(*arguments, **options)
            engine = ref()
            assert engine is not None, "the engine is the one whose method this is"
            self.take(engine.pool)

        return taking_dispose

    def _accounted_connect(self, connect: Callable[[], PoolProxiedConnection]) -> Any:
        account = self._account
        asked, got, waiting = account.asked, account.got, account.waiting

        def accounted_connect() -> PoolProxiedConnection:
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

        return accounted_connect

    def is_gone(self) -> bool:
        """Return whether the application has dropped the engine."""
        return self.dialect() is None

    def use(self) -> PoolUse | None:
        """Return how much of it is in use, None if the pool is gone."""
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
                # "Optional DB API Extensions" of PEP 249; most cursors have it, and it is quicker.
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
                    hold.wrote = either(hold.wrote, reads.judge(statement))

        return timed_execute

    def _timed_execute_no_params(self, execute: Callable[..., None]) -> Any:
        def without(cursor: Any, statement: str, _: Any, context: Any) -> None:
            execute(cursor, statement, context)

        timed_execute = self._timed_execute(without)

        def timed_execute_no_params(cursor: Any, statement: str, context: Any = None) -> None:
            timed_execute(cursor, statement, None, context)

        return timed_execute_no_params


def _forget(ref: weakref.ref[Pool], name: str, listener: Callable[..., None]) -> None:
    pool = ref()
    if pool is not None:
        event.remove(pool, name, listener)


def _limit(pool: QueuePool) -> int | None:
    # No public name tells it: overflow() is that of the moment, and status() has no more.
    overflow: int = cast("Any", pool)._max_overflow
    return None if overflow < 0 else pool.size() + overflow
