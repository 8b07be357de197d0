"""The table of these tests; MariaDB wants to know the length of a text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import MetaData, String, create_engine, delete
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import NullPool

if TYPE_CHECKING:
    from sqlalchemy import URL


class Base(DeclarativeBase):
    metadata = MetaData()


class Note(Base):
    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(String(200), default="")


def empty_tables(url: URL) -> None:
    """Make the table if it is missing, and empty it."""
    engine = create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        Base.metadata.create_all(connection)
        connection.execute(delete(Note))
