"""What a unit of work may do with its Session."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import insert, select, text

from tests.support.models import Note

if TYPE_CHECKING:
    from sqlalchemy.orm import Session, scoped_session


def add_one(registry: scoped_session[Session]) -> None:
    registry.add(Note(text="b"))


def change_one(registry: scoped_session[Session]) -> None:
    registry.scalars(select(Note)).one().text = "b"


def delete_one(registry: scoped_session[Session]) -> None:
    registry.delete(registry.scalars(select(Note)).one())


def insert_by_core(registry: scoped_session[Session]) -> None:
    registry.execute(insert(Note).values(text="b"))


def insert_by_text(registry: scoped_session[Session]) -> None:
    registry.execute(text("INSERT INTO note (text) VALUES ('b')"))


def insert_by_connection(registry: scoped_session[Session]) -> None:
    registry.connection().exec_driver_sql("INSERT INTO note (text) VALUES ('b')")


def insert_by_query_with_returning(registry: scoped_session[Session]) -> None:
    statement = text("INSERT INTO note (text) VALUES ('b') RETURNING id")
    assert registry.scalar(statement)


def read(registry: scoped_session[Session]) -> None:
    registry.scalars(select(Note)).one()


def idle(registry: scoped_session[Session]) -> None:
    registry()


def insert_in_a_savepoint(registry: scoped_session[Session]) -> None:
    with registry.begin_nested():
        registry.add(Note(text="b"))


def insert_in_an_open_savepoint(registry: scoped_session[Session]) -> None:
    registry.begin_nested()
    registry.add(Note(text="b"))
