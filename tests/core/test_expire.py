"""The commit that ends a scope does not expire objects; one in the middle does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, inspect

from tests.support.errors import AppError, raise_error
from tests.support.models import Database, Note
from tests.support.wsgi import BODIES, Program, Server, make_environ, make_registry
from wsgi_dbsession import SessionMiddleware, session_scope

if TYPE_CHECKING:
    from sqlalchemy.orm import Session, scoped_session

    from wsgi_dbsession._moment import CommitOn

    Registry = scoped_session[Session]

pytestmark = pytest.mark.promise("not expired")


@pytest.fixture
def begins(sqlite_database: Database) -> list[str]:
    """A line for each transaction."""
    found: list[str] = []
    event.listen(sqlite_database.engine, "begin", lambda _: found.append("begin"))
    return found


def is_expired(note: Note) -> bool:
    return bool(inspect(note).expired)


def test_objects_of_a_block_are_readable_after_it(
    sqlite_registry: Registry, begins: list[str]
) -> None:
    """Without a Session, a connection or a transaction."""
    with session_scope(sqlite_registry):
        note = Note(text="a")
        sqlite_registry.add(note)

    assert (note.id, note.text) == (1, "a")
    assert inspect(note).detached
    assert begins == ["begin"]


@pytest.mark.parametrize("commit_on", ["complete", "close"])
@pytest.mark.parametrize("body", ["list body", "generator with a length", "unsized generator"])
def test_objects_of_a_request_are_readable_after_it(
    sqlite_registry: Registry, begins: list[str], body: str, commit_on: CommitOn
) -> None:
    """A job queue in the same process may get them."""
    note = Note(text="a")
    app = BODIES[body](Program(lambda: sqlite_registry.add(note)))

    Server().run(SessionMiddleware(app, sqlite_registry, commit_on=commit_on), make_environ())

    assert (note.id, note.text) == (1, "a")
    assert begins == ["begin"]


@pytest.mark.parametrize("body", ["generator with a length", "HEAD"])
def test_reading_an_attribute_after_the_outcome_begins_no_transaction(
    sqlite_database: Database, sqlite_registry: Registry, begins: list[str], body: str
) -> None:
    """While a slow client reads the last block, or in the application's close()."""
    note = Note(text="a")
    read: list[object] = []
    program = Program(
        early=lambda: sqlite_registry.add(note),
        last=lambda: read.append(note.text),
        closing=lambda: read.extend([note.id, note in sqlite_registry]),
    )
    method, name = ("HEAD", "unsized generator") if body == "HEAD" else ("GET", body)

    Server().run(SessionMiddleware(BODIES[name](program), sqlite_registry), make_environ(method))

    assert read == ([1, True] if body == "HEAD" else ["a", 1, True])
    assert begins == ["begin"]


def test_a_hook_reads_what_was_committed(sqlite_registry: Registry, begins: list[str]) -> None:
    """The mail that it sends needs no transaction of its own."""
    read: list[object] = []
    with session_scope(sqlite_registry) as scope:
        sqlite_registry.add(note := Note(text="a"))
        scope.on_commit(lambda: read.append((note.id, note.text)))

    assert read == [(1, "a")]
    assert begins == ["begin"]


def test_the_part_before_the_start_is_expired(
    sqlite_database: Database, sqlite_registry: Registry, begins: list[str]
) -> None:
    """With "headers" the stream goes on, in a transaction of its own, and reads what is new."""
    note = Note(text="a")
    seen: list[object] = []

    def late() -> None:
        with sqlite_database.observer.begin() as connection:
            connection.exec_driver_sql("UPDATE note SET text = 'b'")
        seen.extend([is_expired(note), note.text])

    app = BODIES["unsized generator"](Program(lambda: sqlite_registry.add(note), late))
    Server().run(SessionMiddleware(app, sqlite_registry, commit_on="headers"), make_environ())

    assert seen == [True, "b"]
    assert note.text == "b"
    assert begins == ["begin", "begin"]


@pytest.mark.parametrize("commit_on", ["complete", "headers", "close"])
def test_a_commit_of_the_application_expires(
    sqlite_registry: Registry, commit_on: CommitOn
) -> None:
    """As everywhere in SQLAlchemy."""
    note = Note(text="a")
    seen: list[bool] = []

    def early() -> None:
        sqlite_registry.add(note)
        sqlite_registry.commit()
        seen.append(is_expired(note))

    app = BODIES["list body"](Program(early))
    Server().run(SessionMiddleware(app, sqlite_registry, commit_on=commit_on), make_environ())

    assert seen == [True]


@pytest.mark.parametrize("expires", [True, False])
def test_the_setting_of_the_session_stays(sqlite_database: Database, expires: bool) -> None:
    """It is the one that the application chose, after the outcome too, even a failed one."""
    registry = make_registry(sqlite_database.engine, expire_on_commit=expires)
    settings: list[bool] = []

    def look(*_: Any) -> None:
        settings.append(registry().expire_on_commit)

    with session_scope(registry) as scope:
        registry.add(Note(text="a"))
        scope.on_commit(look)
    event.listen(registry.session_factory, "before_commit", raise_error)
    with pytest.raises(AppError), session_scope(registry) as scope:
        registry.add(Note(text="b"))
        scope.on_rollback(look)

    assert settings == [expires, expires]


def test_without_expiry_headers_expires_nothing(sqlite_database: Database) -> None:
    """A commit in the middle keeps the Session's own setting."""
    registry = make_registry(sqlite_database.engine, expire_on_commit=False)
    note = Note(text="a")
    seen: list[bool] = []
    program = Program(lambda: registry.add(note), lambda: seen.append(is_expired(note)))
    app = BODIES["unsized generator"](program)

    Server().run(SessionMiddleware(app, registry, commit_on="headers"), make_environ())

    assert seen == [False]


def test_a_rollback_expires(sqlite_database: Database, sqlite_registry: Registry) -> None:
    """What is rolled back is not what is in the database."""
    with session_scope(sqlite_registry):
        sqlite_registry.add(Note(text="a"))
    with session_scope(sqlite_registry) as scope:
        note = sqlite_registry.get(Note, 1)
        assert note is not None
        note.text = "b"
        sqlite_registry.flush()
        scope.doom()
        scope.on_rollback(lambda: seen.append(note.text))
        seen: list[str] = []

    assert seen == ["a"]
    assert sqlite_database.notes() == ["a"]
