"""The application's own tests."""

import pytest
from app import Post, User, create_app, db


@pytest.fixture
def app():
    app = create_app()
    with app.app_context():
        db.create_all()
        db.session.add(User(name="ann"))
        db.session.commit()
    yield app
    with app.app_context():
        db.session.remove()
        db.drop_all()
        db.engine.dispose()


def test_a_post_is_written(app):
    client = app.test_client()
    client.post("/login", data={"name": "ann"})

    assert client.post("/posts", data={"title": "hello"}).status_code == 201

    with app.app_context():
        assert db.session.scalar(db.select(Post.title)) == "hello"


def test_posts_come_in_pages(app):
    with app.app_context():
        db.session.add_all([Post(title=f"post {n}", author="ann") for n in range(5)])
        db.session.commit()
    client = app.test_client()

    assert client.get("/posts?page=3").json == {"titles": ["post 4"], "pages": 3}
    assert client.get("/posts/1").json == {"title": "post 0"}
    assert client.get("/posts/9").status_code == 404
    assert client.post("/posts", data={"title": "anonymous"}).status_code == 401
