"""A board with logins, in the manner of Flask-SQLAlchemy's documentation."""

import os

from flask import Flask, request, stream_with_context
from flask_login import LoginManager, UserMixin, current_user, login_required, login_user
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    pass


db = SQLAlchemy(model_class=Base)
login_manager = LoginManager()


class User(UserMixin, db.Model):
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    posts: Mapped[int] = mapped_column(default=0)


class Post(db.Model):
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    author: Mapped[str]


@login_manager.user_loader
def load_user(user_id):
    return db.session.get(User, int(user_id))


def create_app():
    app = Flask(__name__)
    app.config["SECRET_KEY"] = "not a secret"
    app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["DATABASE_URL"]
    db.init_app(app)
    login_manager.init_app(app)

    @app.post("/login")
    def login():
        user = db.first_or_404(db.select(User).filter_by(name=request.form["name"]))
        login_user(user)
        return {"id": user.id}

    @app.get("/posts")
    def posts():
        page = db.paginate(db.select(Post).order_by(Post.id), per_page=2)
        return {"titles": [post.title for post in page], "pages": page.pages}

    @app.get("/posts/<int:post_id>")
    def post(post_id):
        return {"title": db.get_or_404(Post, post_id).title}

    @app.get("/posts.txt")
    def export():
        @stream_with_context
        def lines():
            for post in db.session.scalars(db.select(Post).order_by(Post.id)):
                yield f"{post.title}\n"

        return lines()

    @app.post("/posts")
    @login_required
    def write():
        db.session.add(Post(title=request.form["title"], author=current_user.name))
        db.session.commit()
        current_user.posts += 1
        if current_user.posts > 3:
            return "too many posts", 429
        db.session.commit()
        return "", 201

    @app.cli.command("add-user")
    def add_user():
        db.session.add(User(name="ann"))
        db.session.commit()

    return app
