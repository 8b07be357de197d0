"""The ways in which applications discard a Session, and what they have done with it before."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import insert, select, text

from tests.support.models import Note

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.orm import Session, scoped_session

    Registry = scoped_session[Session]


def remove(registry: Registry) -> None:
    registry.remove()


def close(registry: Registry) -> None:
    registry.close()


def leave_a_block(registry: Registry) -> None:
    with registry():
        pass


def invalidate(registry: Registry) -> None:
    registry().invalidate()


def clear(registry: Registry) -> None:
    registry.registry.clear()


def replace(registry: Registry) -> None:
    registry.registry.set(registry.session_factory())


DISCARDS: dict[str, Callable[[Registry], None]] = {
    "Session.remove()": remove,
    "Session.close()": close,
    "with Session():": leave_a_block,
    "Session.invalidate()": invalidate,
    "registry.clear()": clear,
    "registry.set()": replace,
}


def add(registry: Registry) -> None:
    registry.add(Note(text="lost"))


def flush(registry: Registry) -> None:
    registry.add(Note(text="lost"))
    registry.flush()


def change(registry: Registry) -> None:
    registry.scalars(select(Note)).one().text = "lost"


def delete(registry: Registry) -> None:
    registry.delete(registry.scalars(select(Note)).one())


def insert_by_core(registry: Registry) -> None:
    registry.execute(insert(Note.__table__).values(text="lost"))  # type: ignore[arg-type]


def insert_by_text(registry: Registry) -> None:
    registry.execute(text("INSERT INTO note (text) VALUES ('lost')"))


WRITES: dict[str, Callable[[Registry], None]] = {
    "an object that is added": add,
    "an object that is flushed": flush,
    "an object that is changed": change,
    "an object that is deleted": delete,
    "an insert by Core": insert_by_core,
    "a textual insert": insert_by_text,
}


def read(registry: Registry) -> None:
    assert registry.scalars(select(Note)).one().text == "there"


def read_by_text(registry: Registry) -> None:
    assert registry.scalar(text("SELECT text FROM note")) == "there"


def begin(registry: Registry) -> None:
    registry.begin()


def commit(registry: Registry) -> None:
    registry.execute(text("UPDATE note SET text = 'there'"))
    registry.commit()


def roll_back(registry: Registry) -> None:
    registry.execute(text("INSERT INTO note (text) VALUES ('lost')"))
    registry.rollback()


def touch(registry: Registry) -> None:
    note = registry.scalars(select(Note)).one()
    note.text = str(note.text)


def flush_nothing(registry: Registry) -> None:
    touch(registry)
    read(registry)


HARMLESS: dict[str, Callable[[Registry], None]] = {
    "a read": read,
    "a textual read": read_by_text,
    "a transaction without statements": begin,
    "a commit before": commit,
    "a rollback before": roll_back,
    "an attribute set to what it was": touch,
    "and a query after it": flush_nothing,
}
