"""A pooler between psycopg and PostgreSQL, which psycopg's default does not expect.

PgBouncer in transaction mode lends the server's connections to its clients, one transaction at a
time. psycopg prepares what it executes a sixth time, and each client's first prepared statement
has the same name: a client may run another one's statement, without an error.
"""

from __future__ import annotations

import contextlib
from typing import Any

from sqlalchemy import event
from sqlalchemy.pool import Pool

from ._report import log

_DEFAULT = 5  # psycopg's prepare_threshold; another number is somebody's choice

_WARNING = (
    "a pooler such as PgBouncer is between psycopg and PostgreSQL: in transaction mode, psycopg's "
    "prepared statements may run as those of another client. Pass "
    "connect_args={'prepare_threshold': None} to create_engine(), or, if the pooler supports "
    "them, any number but 5"
)


def is_behind_pooler(driver: Any) -> bool:
    """Return whether psycopg's connection leads to a pooler.

    A pooler makes up the process ID by which a client cancels its queries.

    :param driver: a connection that is not in use; it is in no transaction afterwards.
    """
    with driver.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()", prepare=False, binary=False)
        # Independent of the connection's row_factory.
        pid = int(cursor.pgresult.get_value(0, 0))
    driver.rollback()
    return bool(pid != driver.info.backend_pid)


def _on_first_connect(driver: Any, _: object) -> None:
    if getattr(driver, "prepare_threshold", None) == _DEFAULT:
        # The application's own statement will report this error. One that is not psycopg's, such
        # as gevent's Timeout, must propagate: the answer is still on its way.
        with contextlib.suppress(driver.Error):
            if is_behind_pooler(driver):
                log.warning(_WARNING)


def warn_behind_pooler() -> None:
    """Log a WARNING at the first connection of each engine that is behind a pooler."""
    if not event.contains(Pool, "first_connect", _on_first_connect):
        event.listen(Pool, "first_connect", _on_first_connect)
