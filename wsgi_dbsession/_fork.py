"""After a fork: a child never uses the pooled connections of its parent.

Two processes that speak on one database connection read each other's answers, see "Using
Connection Pools with Multiprocessing or os.fork()" in SQLAlchemy's documentation. This is its
recipe, for every engine: a connection remembers the process that opened it.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import Pool

if TYPE_CHECKING:
    from sqlalchemy.pool import ConnectionPoolEntry

# Forks belong to the process, so this state does too. Weak: it keeps no connection alive.
_records: weakref.WeakSet[ConnectionPoolEntry] = weakref.WeakSet()
_pid = _imported = os.getpid()
_lock = threading.Lock()

# Connections that the parent still uses. When one is garbage-collected, some drivers end the
# server's process through the socket, which is the parent's too. So the child keeps them.
inherited: list[object] = []


def _on_connect(_: object, record: ConnectionPoolEntry) -> None:
    forget_inherited()
    _records.add(record)
    record.info["wsgi_dbsession.pid"] = _pid


def _on_checkout(_: object, record: ConnectionPoolEntry, connection: Any) -> None:
    # A connection without an entry was opened before this module was imported.
    if record.info.get("wsgi_dbsession.pid", _imported) != os.getpid():
        forget_inherited()
        connection.dbapi_connection = None
        msg = "the connection was opened by the parent process"
        raise DisconnectionError(msg)


def forget_inherited() -> bool:
    """Make the parent's connections unusable, if this process is a child that has not yet.

    Called in every child that ``os.fork()`` makes, and before a scope makes a Session: uWSGI
    forks in C, and runs Python's handlers only with ``py-call-osafterfork``. The recipe alone
    would be too late for ``pool_pre_ping``, which comes before the checkout.

    :return: whether this process is such a child.
    """
    global _pid
    if os.getpid() == _pid:
        return False
    with _lock:  # in a child only, where a second thread may be waiting
        if os.getpid() == _pid:
            return False
        for record in list(_records):
            _forget(record)
        _records.clear()
        _pid = os.getpid()
    return True


def _forget(record: Any) -> None:
    inherited.append(record.dbapi_connection)
    record.dbapi_connection = None
    # A Session of the parent may use it, and its collection would send a ROLLBACK. The public
    # way, a listener of "checkout" that keeps it, would slow down each checkout.
    connection = record.fairy_ref and record.fairy_ref()
    if connection is not None:
        connection.dbapi_connection = None
        record.checkin()  # or the child's pool would count it for ever


event.listen(Pool, "connect", _on_connect)
event.listen(Pool, "checkout", _on_checkout)
if hasattr(os, "register_at_fork"):  # pragma: no branch - Windows has no fork
    os.register_at_fork(after_in_child=forget_inherited)
