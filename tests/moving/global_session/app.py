"""A guest book that keeps one global session for the whole process."""

import os

from flask import Flask, request
from sqlalchemy import create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

engine = create_engine(os.environ["DATABASE_URL"])
session = Session(engine)


class Base(DeclarativeBase):
    pass


class Guest(Base):
    __tablename__ = "guest"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    visits: Mapped[int] = mapped_column(default=1)


Base.metadata.create_all(engine)
app = Flask(__name__)


@app.get("/guests")
def guests():
    return [guest.name for guest in session.scalars(select(Guest).order_by(Guest.name))]


@app.post("/guests")
def sign():
    session.add(Guest(name=request.form["name"]))
    session.commit()
    return "", 201


@app.post("/guests/<name>/visits")
def visit(name):
    guest = session.scalars(select(Guest).where(Guest.name == name)).one()
    guest.visits += 1
    session.commit()
    return {"visits": guest.visits}
