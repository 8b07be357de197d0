"""After a fork: a child never uses the pooled connections of its parent.

Two processes that speak on one database connection read each other's answers, see "Using
Connection Pools with Multiprocessing or os.fork()" in SQLAlchemy's documentation.
"""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.orm import scoped_session
    from sqlalchemy.pool import Pool

# Forks belong to the process, so this state does too. Weak: it keeps nobody's engine alive.
_registries: weakref.WeakSet[scoped_session[Any]] = weakref.WeakSet()
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
_pid = os.getpid()

# Pools of the parent. Some drivers (mysqlclient) say goodbye to the server when a connection is
# garbage-collected, on the socket that the parent still uses. So the child keeps them, unused.
_inherited: list[Pool] = []


def watch_registry(registry: scoped_session[Any]) -> None:
    """Dispose of the engines this registry is bound to by the time of a fork."""
    _registries.add(registry)


def watch_engine(engine: Engine) -> None:
    """Dispose of this engine too: a Session used it, by whatever way it found it."""
    _engines.add(engine)


def dispose_after_fork() -> None:
    """Start with an empty pool in every engine, if this process is a child that has not yet.

    Called by Python in every child that ``os.fork()`` makes, and once a request, because uWSGI
    forks in C and runs Python's handlers only with ``py-call-osafterfork``.
    """
    global _pid
    if os.getpid() == _pid:
        return
    for registry in list(_registries):
        options: dict[str, Any] = registry.session_factory.kw
        binds: dict[Any, Any] = options.get("binds") or {}
        for bind in (options.get("bind"), *binds.values()):
            if bind is not None:
                _engines.add(bind.engine)
    for engine in list(_engines):
        _inherited.append(engine.pool)
        engine.dispose(close=False)
    # Last: a thread that comes in between must not find the parent's pool.
    _pid = os.getpid()


if hasattr(os, "register_at_fork"):  # pragma: no branch - Windows has no fork
    os.register_at_fork(after_in_child=dispose_after_fork)
