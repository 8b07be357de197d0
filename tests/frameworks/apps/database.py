"""What the application has in common in all frameworks: its Sessions, its errors, its stream."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import select
from sqlalchemy.orm import scoped_session, sessionmaker

from tests.support.models import Book, Note
from wsgi_dbsession import current_scope

if TYPE_CHECKING:
    from collections.abc import Iterator

# Tests bind it to their engine with Session.session_factory.configure(bind=engine).
Session = scoped_session(sessionmaker(), scopefunc=current_scope)

REPORT = Path(__file__).with_name("report.txt")


class RefusedError(Exception):
    """The application's error handler answers 409."""


class ApologyError(Exception):
    """The application's error handler answers 200, as if all were well."""


def all_notes() -> str:
    """Return the notes, one a line."""
    return "".join(f"{text}\n" for text in Session.scalars(select(Note.text).order_by(Note.id)))


def add_orphan() -> None:
    """Add a book whose author does not exist: it passes the flush, and fails the commit."""
    Session.add(Book(author_id=404))
    Session.flush()


def stream(ending: str) -> Iterator[str]:
    """Add notes while they are sent.

    :param ending: "early" raises before the first block, "raise" after the second, "book" makes
        the commit fail, any other ends well.
    """
    for text in ("one", "two"):
        Session.add(Note(text=text))
        Session.flush()
        if ending == "early":
            raise RuntimeError("before the first block")
        yield f"{text}\n"
    if ending == "raise":
        raise RuntimeError("in mid-stream")
    if ending == "book":
        add_orphan()
