"""The unit of work: which outcome it has, and what counts as work."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import gevent
import pytest

from tests.core.statements import (
    add_one,
    change_one,
    delete_one,
    insert_by_connection,
    insert_by_core,
    insert_by_query_with_returning,
    insert_by_text,
    insert_in_a_savepoint,
    insert_in_an_open_savepoint,
)
from tests.support.errors import AppError, doom, fail, interrupt_by
from tests.support.models import Database, Note
from tests.support.wsgi import (
    ALL_AT_ONCE,
    BODIES,
    Program,
    Server,
    assert_nothing_left,
    make_environ,
    nothing,
)
from wsgi_dbsession import Scope, SessionMiddleware, current_scope, session_scope

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.orm import Session, scoped_session


def keep() -> None:
    current_scope().keep()


def keep_and_doom() -> None:
    current_scope().keep()
    current_scope().doom()


def doom_and_keep() -> None:
    current_scope().doom()
    current_scope().keep()


def keep_and_fail() -> None:
    current_scope().keep()
    raise AppError


@dataclass
class Row:
    """A row of the table: what happens, and what becomes of the work."""

    outcome: str
    reason: str
    early: Callable[[], None] = nothing
    late: Callable[[], None] = nothing
    status: str = "200 OK"
    blocks: int | None = None
    raises: type[BaseException] | None = None


ROWS = {
    "nothing special": Row("commit", "complete"),
    "a redirect": Row("commit", "complete", status="303 See Other"),
    "an error before the body": Row("rollback", "error", early=fail, raises=AppError),
    "an error in the body": Row("rollback", "error", late=fail, raises=AppError),
    "a killed greenlet": Row(
        "rollback",
        "error",
        late=interrupt_by(gevent.GreenletExit()),
        raises=gevent.GreenletExit,
    ),
    "a timeout of gevent": Row(
        "rollback", "error", late=interrupt_by(gevent.Timeout()), raises=gevent.Timeout
    ),
    "the end of the process": Row(
        "rollback", "error", early=interrupt_by(SystemExit()), raises=SystemExit
    ),
    "a doomed scope": Row("rollback", "doomed", early=doom),
    "a scope that is doomed late": Row("rollback", "doomed", late=doom),
    "a doomed scope with a status that is vetoed": Row(
        "rollback", "doomed", early=doom, status="404 Not Found"
    ),
    "a status 4xx": Row("rollback", "veto", status="404 Not Found"),
    "a status 5xx": Row("rollback", "veto", status="500 Internal Server Error"),
    "keep in spite of the status": Row("commit", "kept", early=keep, status="401 Unauthorized"),
    "keep that is said late": Row("commit", "kept", late=keep, status="401 Unauthorized"),
    "keep beaten by doom": Row("rollback", "doomed", early=keep_and_doom),
    "keep beaten by an earlier doom": Row("rollback", "doomed", early=doom_and_keep),
    "keep beaten by an error": Row("rollback", "error", late=keep_and_fail, raises=AppError),
    "a client that goes away": Row("rollback", "incomplete", blocks=1),
    "keep beaten by a client that goes away": Row("rollback", "incomplete", early=keep, blocks=1),
    "a client that goes away from a doomed scope": Row("rollback", "doomed", early=doom, blocks=1),
}


@pytest.mark.promise("error", "doom", "incomplete", "keep", "veto", "otherwise")
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_the_first_row_that_holds_is_the_outcome(
    sqlite_database: Database, sqlite_registry: scoped_session[Session], row: Row, body: str
) -> None:
    """Each row of the table holds for each kind of body."""
    check_row(sqlite_database, sqlite_registry, row, body)


@pytest.mark.promise("error", "doom", "incomplete", "keep", "veto", "otherwise")
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_the_table_holds_on_postgres(
    postgres_database: Database, postgres_registry: scoped_session[Session], row: Row
) -> None:
    """Each row of the table holds where transactions are isolated from each other."""
    check_row(postgres_database, postgres_registry, row, "unsized generator")


def check_row(database: Database, registry: scoped_session[Session], row: Row, body: str) -> None:
    scopes: list[Scope] = []

    def early() -> None:
        scopes.append(current_scope())
        registry.add(Note(text="early"))
        row.early()

    def late() -> None:
        registry.add(Note(text="late"))
        row.late()

    app = BODIES[body](Program(early=early, late=late, status=row.status))
    expected = (row.outcome, row.reason)
    if row.reason == "incomplete" and body in ALL_AT_ONCE:
        # The body was complete before the client went away.
        expected = ("commit", "kept" if row.early is keep else "complete")

    with pytest.raises(row.raises) if row.raises else contextlib.nullcontext():
        Server().run(SessionMiddleware(app, registry), make_environ("POST"), blocks=row.blocks)

    (scope,) = scopes
    assert (scope.outcome, scope.reason) == expected
    assert database.notes() == (["early", "late"] if scope.outcome == "commit" else [])
    assert_nothing_left(registry)


@pytest.mark.promise("every change")
@pytest.mark.parametrize(
    ("work", "notes"),
    [
        pytest.param(add_one, ["a", "b"], id="an object that is added"),
        pytest.param(change_one, ["b"], id="an object that is changed"),
        pytest.param(delete_one, [], id="an object that is deleted"),
        pytest.param(insert_by_core, ["a", "b"], id="a Core insert"),
        pytest.param(insert_by_text, ["a", "b"], id="textual SQL"),
        pytest.param(insert_by_connection, ["a", "b"], id="the driver's SQL"),
        pytest.param(insert_by_query_with_returning, ["a", "b"], id="SQL that returns rows"),
        pytest.param(insert_in_a_savepoint, ["a", "b"], id="a savepoint"),
        pytest.param(insert_in_an_open_savepoint, ["a", "b"], id="a savepoint left open"),
    ],
)
@pytest.mark.parametrize("fails", [False, True], ids=["committed", "rolled back"])
def test_every_change_counts(
    database: Database,
    registry: scoped_session[Session],
    work: Callable[[scoped_session[Session]], None],
    notes: list[str],
    fails: bool,
) -> None:
    """A transaction is committed or rolled back, whatever way of change it holds."""
    with session_scope(registry):
        registry.add(Note(text="a"))

    expected = ["a"] if fails else notes

    with pytest.raises(AppError) if fails else contextlib.nullcontext(), session_scope(registry):
        work(registry)
        if fails:
            raise AppError

    assert database.notes() == expected


@pytest.mark.promise("own commits")
def test_what_the_application_committed_itself_stays(
    database: Database, registry: scoped_session[Session]
) -> None:
    """A commit of the application is not undone by the outcome."""
    with pytest.raises(AppError), session_scope(registry) as scope:
        registry.add(Note(text="own"))
        registry.commit()
        registry.add(Note(text="lost"))
        raise AppError

    assert scope.outcome == "rollback"
    assert database.notes() == ["own"]
