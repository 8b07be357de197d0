"""A guest book in Flask. Run it: ``python examples/tested_app/app.py``.

What matters here is its test suite, in the files beside this one: ``pytest examples/tested_app``.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from flask import Flask, Response, request
from sqlalchemy import ForeignKey, create_engine, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, scoped_session, sessionmaker

from wsgi_dbsession import SessionMiddleware, current_scope

if TYPE_CHECKING:
    from collections.abc import Iterator

engine = create_engine(os.environ.get("DATABASE_URL", "sqlite:///guestbook.db"))
Session = scoped_session(sessionmaker(engine), scopefunc=current_scope)


class Base(DeclarativeBase):
    pass


class Guest(Base):
    __tablename__ = "guest"

    name: Mapped[str] = mapped_column(primary_key=True)
    failed_logins: Mapped[int] = mapped_column(default=0)


class Entry(Base):
    __tablename__ = "entry"

    id: Mapped[int] = mapped_column(primary_key=True)
    guest: Mapped[str] = mapped_column(ForeignKey(Guest.name))
    text: Mapped[str]


app = Flask(__name__)
outbox: list[str] = []  # mail that would be sent


@app.post("/guests")
def add_guest() -> tuple[str, int]:
    name = request.form["name"]
    try:
        with Session.begin_nested():
            Session.add(Guest(name=name))
    except IntegrityError:
        return "the name is taken", 409
    current_scope().on_commit(lambda: outbox.append(f"welcome, {name}"))
    return "", 201


@app.post("/entries")
def add_entry() -> tuple[str, int]:
    guest = Session.get(Guest, request.form["name"])
    entry = Entry(guest=request.form["name"], text=request.form["text"])
    Session.add(entry)
    if guest is None or not entry.text:
        return "who are you, and what do you want to say?", 400  # and the entry is rolled back
    return "", 201


@app.post("/login")
def login() -> tuple[str, int]:
    guest = Session.scalars(select(Guest).filter_by(name=request.form["name"])).one()
    guest.failed_logins += 1
    current_scope().keep()  # count the failure in spite of the status
    return "wrong password", 403


@app.get("/entries.txt")
def export() -> Response:
    def lines() -> Iterator[str]:
        for text in Session.scalars(select(Entry.text).order_by(Entry.id)):
            yield f"{text}\n"

    return Response(lines(), mimetype="text/plain")


app.wsgi_app = SessionMiddleware(app.wsgi_app, Session)  # type: ignore[method-assign]


if __name__ == "__main__":
    Base.metadata.create_all(engine)
    app.run()
