"""Reads that cannot write: ``python replica_app.py`` serves notes on http://127.0.0.1:8000/.

A GET reads on an engine on which the database refuses writes. With PostgreSQL it may read from
replicas, and still finds what its client has written:
``DATABASE_URL=postgresql+psycopg://... REPLICA_URLS="postgresql+psycopg://... ..."``.
"""

import os

from flask import Flask, request
from sqlalchemy import create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, scoped_session, sessionmaker

from wsgi_dbsession import SessionMiddleware, current_scope, session_scope
from wsgi_dbsession.replica import (
    Replicas,
    is_refused_write,
    read_only_engine,
    session_class,
)
from wsgi_dbsession.retry import RetryMiddleware

engine = create_engine(os.environ.get("DATABASE_URL", "sqlite:///notes.db"))
urls = os.environ.get("REPLICA_URLS", "").split()


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]
    visits: Mapped[int] = mapped_column(default=0)


app = Flask(__name__)

if urls:
    replicas = Replicas(
        engine,
        [read_only_engine(url) for url in urls],
        secret=os.environ.get("SECRET", "not a secret, only an example"),
    )
    Session = scoped_session(sessionmaker(class_=replicas.Session), scopefunc=current_scope)
    app.wsgi_app = replicas.wrap(  # type: ignore[assignment]
        RetryMiddleware(SessionMiddleware(app.wsgi_app, Session))
    )
else:
    reading = session_class(engine, read_only_engine(engine))
    Session = scoped_session(sessionmaker(class_=reading), scopefunc=current_scope)
    app.wsgi_app = RetryMiddleware(  # type: ignore[method-assign]
        SessionMiddleware(app.wsgi_app, Session), on=is_refused_write
    )


@app.get("/")
def notes() -> list[str]:
    return list(Session.scalars(select(Note.text).order_by(Note.id)))


@app.post("/")
def add_note() -> tuple[str, int]:
    note = Note(text=request.form["text"])
    Session.add(note)
    Session.flush()
    return f"/{note.id}", 201


@app.get("/<int:number>")
def note(number: int) -> tuple[str, int]:
    found = Session.get(Note, number)
    if found is None:
        return "no such note", 404
    found.visits += 1  # refused where the GET reads: it runs again where it may write
    return f"{found.text}, visit {found.visits}", 200


if __name__ == "__main__":
    Base.metadata.create_all(engine)
    with session_scope(Session):  # not read_only: a replica may not have the table yet
        print(len(notes()), "notes")
    app.run(port=int(os.environ.get("PORT", "8000")))
