"""What is logged, and that success is not."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from tests.core.statements import add_one, change_one, delete_one, idle, insert_by_text, read
from tests.support.errors import AppError, fail
from tests.support.models import Note
from tests.support.wsgi import BODIES, Program, Server, make_environ
from wsgi_dbsession import SessionMiddleware, session_scope

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.orm import Session, scoped_session

    from wsgi_dbsession._moment import CommitOn

pytestmark = pytest.mark.promise("log")


@pytest.mark.parametrize("commit_on", ["complete", "headers", "close"])
@pytest.mark.parametrize("body", BODIES)
def test_the_normal_way_logs_nothing(
    sqlite_registry: scoped_session[Session],
    caplog: pytest.LogCaptureFixture,
    body: str,
    commit_on: CommitOn,
) -> None:
    """A commit, a rollback after an error and one after an early close: not one line."""
    caplog.set_level(logging.DEBUG, "wsgi_dbsession")

    def early() -> None:
        sqlite_registry.add(Note(text="a"))

    def run(program: Program, blocks: int | None = None) -> None:
        app = SessionMiddleware(BODIES[body](program), sqlite_registry, commit_on=commit_on)
        Server().run(app, make_environ("POST"), blocks=blocks)

    run(Program(early))
    run(Program(early), blocks=1)
    with pytest.raises(AppError):
        run(Program(early, late=fail))

    assert caplog.record_tuples == []


@pytest.mark.promise("no silent loss")
@pytest.mark.parametrize(
    ("method", "work", "logged"),
    [
        pytest.param("POST", insert_by_text, True, id="textual SQL in a POST"),
        pytest.param("GET", add_one, True, id="an object that is added in a GET"),
        pytest.param("GET", change_one, True, id="an object that is changed in a GET"),
        pytest.param("GET", delete_one, True, id="an object that is deleted in a GET"),
        pytest.param("GET", read, False, id="a GET that reads"),
        pytest.param("POST", idle, False, id="a POST without a transaction"),
    ],
)
def test_writes_that_a_veto_discards_are_logged(
    sqlite_registry: scoped_session[Session],
    caplog: pytest.LogCaptureFixture,
    method: str,
    work: Callable[[scoped_session[Session]], None],
    logged: bool,
) -> None:
    """One line says which request lost what it wrote, and what to call if that is wrong."""
    with session_scope(sqlite_registry):
        sqlite_registry.add(Note(id=1, text="a"))
    caplog.set_level(logging.DEBUG, "wsgi_dbsession")
    program = Program(lambda: work(sqlite_registry), status="404 Not Found")
    app = SessionMiddleware(BODIES["list body"](program), sqlite_registry)

    Server().run(app, make_environ(method, "/notes", SCRIPT_NAME="/app"))

    line = f"{method} /app/notes: discarding uncommitted changes: status 404; "
    line += "scope.keep() commits them"
    expected = [("wsgi_dbsession", logging.INFO, line)] if logged else []
    assert caplog.record_tuples == expected


def test_one_line_stands_for_all_sessions(
    two: tuple[scoped_session[Session], scoped_session[Session]], caplog: pytest.LogCaptureFixture
) -> None:
    """Its record has the request for machines."""
    caplog.set_level(logging.DEBUG, "wsgi_dbsession")

    def write() -> None:
        for registry in two:
            registry.add(Note(text="a"))

    program = Program(write, status="404 Not Found")
    app = SessionMiddleware(BODIES["list body"](program), *two)

    Server().run(app, make_environ("POST", "/notes"))

    (record,) = caplog.records
    assert vars(record)["method"] == "POST"
    assert vars(record)["path"] == "/notes"
