"""The table of keys."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import Column, DateTime, LargeBinary, String, Table, Text, delete
from sqlalchemy.dialects import mysql

if TYPE_CHECKING:
    from sqlalchemy import CursorResult, MetaData
    from sqlalchemy.orm import Session, scoped_session

COLUMNS = frozenset(
    {"id", "idempotency_key", "fingerprint", "claim", "created_at", "status", "headers", "body"}
)


def idempotency_table(metadata: MetaData, *, name: str = "idempotency_key") -> Table:
    """Return a new table of keys: a plain ``Table``, which ``create_all()`` and Alembic find.

    ::

        keys = idempotency_table(Base.metadata)

    Each row has a key of a principal, the fingerprint of its request, and the response. The key is
    readable, but the principal is only part of the digest ``id``. ``body`` is NULL if the response
    was not stored. ``status`` is NULL if the application committed in the middle of a request that
    is still running or has failed.

    :param metadata: the application's ``MetaData``, usually ``Base.metadata``.
    :param name: the table's name.
    :return: the table, for :class:`Idempotency` and :func:`purge`.
    """
    return Table(
        name,
        metadata,
        # Digests, because MariaDB ignores case in comparisons and limits the length of an index.
        Column("id", String(64), primary_key=True),
        Column("idempotency_key", String(255), nullable=False),
        Column("fingerprint", String(64), nullable=False),
        Column("claim", String(32), nullable=False),
        Column("created_at", DateTime, nullable=False, index=True),
        Column("status", String(255)),
        Column("headers", Text),
        # MariaDB's BLOB ends at 64 KiB.
        Column("body", LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")),
    )


def now() -> datetime:
    """Return the current time as the table stores it: in UTC, without a time zone."""
    return datetime.now(timezone.utc).replace(tzinfo=None)


def purge(session: Session | scoped_session[Any], table: Table, *, older_than: timedelta) -> int:
    """Delete the keys that are older than a ``timedelta``, in the Session's transaction.

    ::

        with session_scope(Session):
            purge(Session, keys, older_than=timedelta(days=2))

    A request that is repeated after its key was deleted takes effect again.

    :param session: the Session, or the application's registry.
    :param table: the table of keys.
    :param older_than: a longer time than any client keeps repeating a request.
    :return: the number of deleted keys.
    :raises TypeError: if ``older_than`` is not a ``timedelta``.
    :raises ValueError: if ``older_than`` is negative.
    """
    kind: type = type(older_than)
    if not issubclass(kind, timedelta):
        msg = (
            f"older_than must be a timedelta, got {older_than!r}. "
            "Pass for example `timedelta(days=2)`"
        )
        raise TypeError(msg)
    if older_than < timedelta(0):
        msg = f"older_than must not be negative, got {older_than!r}. Pass the age of the keys"
        raise ValueError(msg)
    statement = delete(table).where(table.c.created_at < now() - older_than)
    return cast("CursorResult[Any]", session.execute(statement)).rowcount
