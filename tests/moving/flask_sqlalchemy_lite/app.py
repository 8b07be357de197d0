"""A to-do list, in the manner of Flask-SQLAlchemy-Lite's documentation."""

import os

from flask import Flask, abort, request
from flask_sqlalchemy_lite import SQLAlchemy
from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    pass


class Task(Base):
    __tablename__ = "task"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    done: Mapped[bool] = mapped_column(default=False)


db = SQLAlchemy()


def create_app():
    app = Flask(__name__)
    app.config["SQLALCHEMY_ENGINES"] = {"default": os.environ["DATABASE_URL"]}
    db.init_app(app)
    with app.app_context():
        Base.metadata.create_all(db.engine)

    @app.get("/tasks")
    def tasks():
        return [task.title for task in db.session.scalars(select(Task).order_by(Task.id))]

    @app.post("/tasks")
    def add():
        db.session.add(Task(title=request.form["title"]))
        db.session.commit()
        return "", 201

    @app.post("/tasks/<int:task_id>/done")
    def finish(task_id):
        task = db.session.get(Task, task_id) or abort(404)
        task.done = True
        return "", 204

    @app.get("/tasks.csv")
    def export():
        def lines():
            for task in db.session.scalars(select(Task).order_by(Task.id)):
                yield f"{task.title},{task.done}\n"

        return app.response_class(lines(), mimetype="text/csv")

    @app.cli.command("clear")
    def clear():
        for task in db.session.scalars(select(Task).filter_by(done=True)):
            db.session.delete(task)
        db.session.commit()

    return app
