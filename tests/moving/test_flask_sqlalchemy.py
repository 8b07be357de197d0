"""docs/moving/flask-sqlalchemy.md keeps the extension, and makes one transaction of a request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_engine, text

from tests.docs.pages import run
from tests.moving.guides import Guide

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Board:
    """The application with a user who has logged in, and a look at what is committed."""

    def __init__(self, module: Any, url: str) -> None:
        self._url = url
        app = module.create_app()
        with app.app_context():
            module.db.create_all()
            self.engine = module.db.engine
        result = app.test_cli_runner().invoke(args=["add-user"])
        assert result.exit_code == 0, result.output
        self.client = app.test_client()
        assert self.client.post("/login", data={"name": "ann"}).json == {"id": 1}

    def write(self, title: str) -> int:
        code: int = self.client.post("/posts", data={"title": title}).status_code
        return code

    def titles(self) -> list[str]:
        engine = create_engine(self._url)
        with engine.connect() as connection:
            found = list(connection.scalars(text("SELECT title FROM post ORDER BY id")))
        engine.dispose()
        return found


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    url = f"sqlite:///{tmp_path / 'board.db'}"
    monkeypatch.setenv("DATABASE_URL", url)
    return url


@pytest.fixture
def guide(tmp_path: Path, url: str) -> Guide:
    return Guide("flask-sqlalchemy", tmp_path)


@pytest.fixture
def before(guide: Guide, url: str) -> Iterator[Board]:
    yield from open_board(guide, url)


@pytest.fixture
def after(guide: Guide, url: str) -> Iterator[Board]:
    guide.carry_out()
    yield from open_board(guide, url)


def open_board(guide: Guide, url: str) -> Iterator[Board]:
    with guide.imported() as module:
        board = Board(module, url)
        yield board
        board.engine.dispose()


def test_before_a_refused_post_is_written(before: Board) -> None:
    """The 429 comes after the first commit."""
    assert [before.write(f"post {number}") for number in range(4)] == [201, 201, 201, 429]
    assert before.titles() == ["post 0", "post 1", "post 2", "post 3"]


def test_after_a_refused_post_is_not_written(after: Board) -> None:
    """The request is one transaction; pages, 404s, streams and the login work as before."""
    assert [after.write(f"post {number}") for number in range(4)] == [201, 201, 201, 429]
    assert after.titles() == ["post 0", "post 1", "post 2"]
    assert after.client.get("/posts?page=2").json == {"titles": ["post 2"], "pages": 2}
    assert after.client.get("/posts/1").json == {"title": "post 0"}
    assert after.client.get("/posts/9").status_code == 404
    assert after.client.get("/posts.txt").text == "post 0\npost 1\npost 2\n"


def test_after_the_teardown_left_in_place_is_an_error(guide: Guide, url: str) -> None:
    """Whoever forgets that line is told by the first request that writes."""
    guide.carry_out()
    path = guide.folder / "app.py"
    line = "    app.teardown_appcontext_funcs.pop()  # db.init_app was the last to add one\n"
    code = path.read_text()
    assert line in code
    path.write_text(code.replace(line, ""))
    for board in open_board(guide, url):
        with pytest.raises(RuntimeError, match="_teardown_session"):
            board.write("lost")
        assert board.titles() == []


@pytest.mark.parametrize("carried_out", [False, True], ids=["before", "after"])
def test_the_tests_of_the_application_pass(carried_out: bool, guide: Guide, url: str) -> None:
    """They are changed by the guide as well."""
    if carried_out:
        guide.carry_out()
    output = run(guide.folder, "pytest", "-q", "-p", "no:cacheprovider", DATABASE_URL=url)
    assert "2 passed" in output
