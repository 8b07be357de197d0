"""The tables that tests use, and a database with them."""

from __future__ import annotations

import sqlite3
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Engine, ForeignKey, create_engine, event, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import NullPool

if TYPE_CHECKING:
    from sqlalchemy import URL, Connection
    from sqlalchemy.orm import InstrumentedAttribute

T = TypeVar("T")


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(default="")


class Author(Base):
    __tablename__ = "author"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(default="")


class Book(Base):
    """A book by an author who does not exist passes every flush, and fails in the commit."""

    __tablename__ = "book"

    id: Mapped[int] = mapped_column(primary_key=True)
    author_id: Mapped[int] = mapped_column(
        ForeignKey("author.id", deferrable=True, initially="DEFERRED")
    )


@dataclass(frozen=True)
class Database:
    """An engine as an application has it, and a second one to see what really was committed."""

    engine: Engine
    observer: Engine

    @property
    def url(self) -> URL:
        """Where it is; ``url.render_as_string(hide_password=False)`` for other processes."""
        return self.engine.url

    def committed(self, column: InstrumentedAttribute[T]) -> list[T]:
        """Return a column's committed values in order, seen through a connection of its own."""
        with self.observer.connect() as connection:
            return list(connection.scalars(select(column).order_by(column)))

    def notes(self) -> list[str]:
        """Return the texts of the committed notes, in order."""
        return self.committed(Note.text)


def make_engine(url: URL | str, **options: Any) -> Engine:
    """Make an engine with a small pool that soon says so when connections leak.

    On SQLite, foreign keys are checked, and each transaction is a true one: the driver's own
    rules for when to begin would leave reads, savepoints and DDL outside.
    """
    if "poolclass" not in options:
        options = {"pool_size": 5, "max_overflow": 0, "pool_timeout": 5, **options}
    engine = create_engine(url, **options)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


class AlwaysInTransaction(sqlite3.Connection):
    """What ``autocommit=False`` makes of a connection from Python 3.12 on."""

    autocommit: Any = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "isolation_level": None})
        self.execute("BEGIN")

    def commit(self) -> None:
        self.execute("COMMIT")
        self.execute("BEGIN")

    def rollback(self) -> None:
        self.execute("ROLLBACK")
        self.execute("BEGIN")


def without_autocommit(url: URL | str, **options: Any) -> Engine:
    """Make an engine whose connections are always in a transaction, as PEP 249 has it."""
    arguments: dict[str, Any] = {"autocommit": False}
    if sys.version_info < (3, 12):
        arguments = {"factory": AlwaysInTransaction}
    return create_engine(url, connect_args=arguments, **options)


def make_database(url: URL | str, **options: Any) -> Database:
    """Make an engine, see :func:`make_engine`, and an observer of the same database."""
    return Database(make_engine(url, **options), make_engine(url, poolclass=NullPool))


def _set_up_sqlite(connection: Any, record: object) -> None:
    connection.isolation_level = None
    connection.execute("PRAGMA foreign_keys=ON")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=OFF")


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")
