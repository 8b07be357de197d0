"""Flask: ``python flask_app.py`` serves notes on http://127.0.0.1:8000/."""

import os

from flask import Flask, request
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


app = Flask(__name__)
app.wsgi_app = SessionMiddleware(app.wsgi_app, Session)  # type: ignore[method-assign]


@app.get("/")
def notes() -> list[str]:
    return list(Session.scalars(select(Note.text).order_by(Note.id)))


@app.post("/")
def add_note() -> tuple[str, int]:
    text = request.form["text"]
    Session.add(Note(text=text))
    if not text:
        return "a note needs a text", 422  # 4xx: rolled back
    return "saved", 201  # committed before the client sees this


if __name__ == "__main__":
    Base.metadata.create_all(engine)
    app.run(port=int(os.environ.get("PORT", "8000")))
