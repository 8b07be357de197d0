"""The tables of the guestbook, and its engine."""

from __future__ import annotations

import time
from sqlite3 import OperationalError
from typing import TYPE_CHECKING, Any

from sqlalchemy import ForeignKey, create_engine, event
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

if TYPE_CHECKING:
    from sqlalchemy import Engine


class Base(DeclarativeBase):
    """The tables of the guestbook."""


class Guest(Base):
    """A person who signs."""

    __tablename__ = "guest"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)


class Entry(Base):
    """What a guest wrote. The database checks only at COMMIT that the guest exists."""

    __tablename__ = "entry"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]
    guest_id: Mapped[int] = mapped_column(
        ForeignKey("guest.id", deferrable=True, initially="DEFERRED")
    )
    guest: Mapped[Guest] = relationship()


def make_engine(url: str) -> Engine:
    """Make an engine with five connections; who gets none in two seconds gets an error."""
    engine = create_engine(url, pool_pre_ping=True, pool_size=5, max_overflow=0, pool_timeout=2)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "do_execute", _wait_for_the_lock)
    return engine


def _prepare_sqlite(connection: Any, _: object) -> None:
    connection.execute("PRAGMA foreign_keys=ON")
    connection.execute("PRAGMA journal_mode=WAL")  # readers do not wait for the one writer
    connection.execute("PRAGMA busy_timeout=0")


def _wait_for_the_lock(cursor: Any, statement: str, parameters: Any, _: object) -> bool:
    # SQLite would wait in C, and all greenlets with it, also the one that holds the lock.
    end = time.monotonic() + 5
    while True:
        try:
            cursor.execute(statement, parameters)
        except OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > end:
                raise
            time.sleep(0.02)
        else:
            return True
