"""Bottle: ``python bottle_app.py`` serves notes on http://127.0.0.1:8000/."""

import os

from bottle import Bottle, HTTPResponse, request, run
from sqlalchemy import create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, scoped_session, sessionmaker

from wsgi_dbsession import SessionMiddleware, current_scope

engine = create_engine(os.environ.get("DATABASE_URL", "sqlite:///notes.db"), pool_pre_ping=True)
Session = scoped_session(sessionmaker(engine), scopefunc=current_scope)


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


bottle = Bottle()


@bottle.get("/")  # type: ignore[untyped-decorator]
def notes() -> dict[str, list[str]]:
    return {"notes": list(Session.scalars(select(Note.text).order_by(Note.id)))}


@bottle.post("/")  # type: ignore[untyped-decorator]
def add_note() -> HTTPResponse:
    text = request.forms.text
    Session.add(Note(text=text))
    if not text:
        return HTTPResponse("a note needs a text", 422)  # 4xx: rolled back
    return HTTPResponse("saved", 201)  # committed before the client sees this


app = SessionMiddleware(bottle, Session)

if __name__ == "__main__":
    Base.metadata.create_all(engine)
    run(app, host="127.0.0.1", port=int(os.environ.get("PORT", "8000")))
