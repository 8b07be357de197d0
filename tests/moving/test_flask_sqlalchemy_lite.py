"""docs/moving/flask-sqlalchemy-lite.md keeps the engines, and gives streams their Session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text

from tests.moving.guides import Guide
from wsgi_dbsession.testing import isolate

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class ToDo:
    """The application with two tasks, and a look at what is committed."""

    def __init__(self, module: Any) -> None:
        self.session: Any = getattr(module, "Session", None)
        self.app = module.create_app()
        self.client = self.app.test_client()
        with self.app.app_context():
            self.engine = module.db.engine
        for title in ("buy tea", "drink tea"):
            assert self.client.post("/tasks", data={"title": title}).status_code == 201

    def finish(self) -> int:
        code: int = self.client.post("/tasks/1/done").status_code
        return code

    def finished(self) -> list[str]:
        with self.engine.connect() as connection:
            return list(connection.scalars(text("SELECT title FROM task WHERE done")))


@pytest.fixture
def guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Guide:
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path / 'tasks.db'}")
    return Guide("flask-sqlalchemy-lite", tmp_path)


@pytest.fixture
def before(guide: Guide) -> Iterator[ToDo]:
    yield from open_list(guide)


@pytest.fixture
def after(guide: Guide) -> Iterator[ToDo]:
    guide.carry_out()
    yield from open_list(guide)


def open_list(guide: Guide) -> Iterator[ToDo]:
    with guide.imported() as module:
        todo = ToDo(module)
        yield todo
        todo.engine.dispose()


def test_before_a_forgotten_commit_is_a_success(before: ToDo) -> None:
    """The task is not done after the 204."""
    assert before.finish() == 204
    assert before.finished() == []


def test_before_a_stream_has_no_session(before: ToDo) -> None:
    """The application context is gone when the body is asked for."""
    with pytest.raises(RuntimeError, match="outside of application context"):
        before.client.get("/tasks.csv")


def test_after_everything_is_committed_and_streamed(after: ToDo) -> None:
    """A forgotten commit is no loss, and the stream has the Session of its request."""
    assert after.finish() == 204
    assert after.finished() == ["buy tea"]
    assert after.client.get("/tasks").json == ["buy tea", "drink tea"]
    assert after.client.get("/tasks.csv").text == "buy tea,True\ndrink tea,False\n"
    assert after.client.post("/tasks/9/done").status_code == 404
    result = after.app.test_cli_runner().invoke(args=["clear"])
    assert result.exit_code == 0, result.output
    assert after.client.get("/tasks").json == ["drink tea"]


def test_after_isolate_undoes_a_test(after: ToDo) -> None:
    """It replaces ``db.test_isolation()``, as the page says."""
    with isolate(after.session):
        assert after.finish() == 204
        assert after.client.get("/tasks.csv").text == "buy tea,True\ndrink tea,False\n"
    assert after.finished() == []
