"""What fails in production fails in isolation too."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import sys
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_engine, insert, text
from sqlalchemy.exc import IntegrityError, PendingRollbackError

from tests.support.models import Author, Base, Book, Database, Note, make_engine
from tests.support.wsgi import make_registry
from tests.testing.applications import (
    Registry,
    add,
    make_app,
    notes,
    problem,
    request,
    use_savepoints,
)
from wsgi_dbsession import session_scope
from wsgi_dbsession.testing import isolate

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support import postgres

pytestmark = pytest.mark.promise("as in production")


# -- it fails as in production --------------------------------------------------------------------


def test_a_commit_fails_as_in_production(database: Database, registry: Registry) -> None:
    """A deferred foreign key passes the flush and fails the commit; later commits succeed."""

    def work() -> None:
        registry.add_all([Note(text="lost"), Book(author_id=7)])
        registry.flush()

    app = make_app(
        work, registry, commit_error=make_app(int, registry, status="503 Service Unavailable")
    )
    with isolate(registry) as outcomes:
        assert request(app) == 503
        assert outcomes[0].reason == "rolled back"
        with pytest.raises(IntegrityError), session_scope(registry):
            registry.add(Book(author_id=7))
        add(registry, "after it")
        assert notes(registry) == ["after it"]

    assert database.notes() == []


def test_a_deferred_key_may_be_mended_before_the_commit(registry: Registry) -> None:
    """It is checked at the commit, not at the release of a savepoint, and not for ever."""
    for number in range(2):
        with isolate(registry), session_scope(registry):
            with registry.begin_nested():
                registry.add(Book(author_id=number))
            registry.add(Author(id=number))
            registry.commit()
            registry.add(Author(id=number + 10))
            registry.flush()
            registry.add(Book(author_id=number + 10))


def test_each_transaction_begins_with_the_constraints_as_declared(
    postgres_database: Database,
) -> None:
    """After a commit, a constraint that is deferrable but not deferred is immediate still."""
    registry = make_registry(postgres_database.engine)
    with isolate(registry):
        with session_scope(registry):
            registry.execute(
                text("CREATE TABLE page (book integer REFERENCES book DEFERRABLE, n integer)")
            )
            registry.execute(text("INSERT INTO page VALUES (NULL, 1)"))
        with session_scope(registry):
            with pytest.raises(IntegrityError), registry.begin_nested():
                registry.execute(text("INSERT INTO page VALUES (7, 1)"))
            registry.add(Book(author_id=7))
            registry.flush()
            registry.rollback()


def test_without_deferrable_constraints_a_commit_checks_none(
    postgres_database: Database,
) -> None:
    """A database without such constraints has nothing that could fail."""
    registry = make_registry(postgres_database.engine)
    with isolate(registry):
        with session_scope(registry):
            registry.execute(text("DROP TABLE book"))
        with session_scope(registry):
            registry.execute(
                text("CREATE TABLE page (n integer UNIQUE DEFERRABLE INITIALLY IMMEDIATE)")
            )
        add(registry, "a")
        assert notes(registry) == ["a"]


def test_violations_from_before_the_isolation_fail_no_commit(tmp_path: Path) -> None:
    """SQLite would not find them either: they were made without the check."""
    engine = make_engine(f"sqlite:///{tmp_path / 'test.db'}")
    Base.metadata.create_all(engine)
    with sqlite3.connect(str(engine.url.database)) as connection:
        connection.execute("INSERT INTO book (author_id) VALUES (7)")
    connection.close()
    registry = make_registry(engine)
    with isolate(registry) as outcomes:
        add(registry, "a")
        assert outcomes[0].outcome == "commit"
    engine.dispose()


def test_an_unchecked_foreign_key_fails_no_commit(tmp_path: Path) -> None:
    """SQLite checks none unless it is told to."""
    engine = create_engine(f"sqlite:///{tmp_path / 'test.db'}")
    Base.metadata.create_all(engine)
    registry = make_registry(engine)
    with isolate(registry) as outcomes:
        with session_scope(registry):
            registry.add(Book(author_id=7))
        assert outcomes[0].outcome == "commit"
    engine.dispose()


def test_a_failed_statement_is_as_in_production(registry: Registry) -> None:
    """In a savepoint it can be caught; without one the commit fails."""
    add_note = insert(Note).values(id=1)
    with isolate(registry):
        with session_scope(registry):
            registry.execute(add_note)
            with pytest.raises(IntegrityError), registry.begin_nested():
                registry.execute(add_note)
            registry.add(Note(id=2, text="after it"))
        assert notes(registry) == ["", "after it"]


def test_an_aborted_transaction_cannot_be_committed(postgres_database: Database) -> None:
    """PostgreSQL's aborted transaction stays one, also when another one came in between."""
    registry = make_registry(postgres_database.engine)
    with isolate(registry) as outcomes:
        for audit in (False, True):
            with pytest.raises(PendingRollbackError), session_scope(registry):
                registry.add(Note(text="lost"))
                registry.flush()
                with pytest.raises(Exception, match="division by zero"):
                    registry.execute(text("SELECT 1 / 0"))
                if audit:
                    add(registry, "audit")
        assert [each.reason for each in outcomes] == ["rolled back", "rolled back", "complete"]
        assert notes(registry) == ["audit"]


def test_an_aborted_transaction_goes_on_after_its_rollback(postgres_database: Database) -> None:
    """Nor can it be used until it is rolled back, and only as far as it has to be."""
    registry = make_registry(postgres_database.engine)
    with isolate(registry):
        with session_scope(registry):
            registry.add(Note(text="before"))
            savepoint = registry.begin_nested()
            with pytest.raises(Exception, match="division by zero"):
                registry.execute(text("SELECT 1 / 0"))
            add(registry, "audit")
            with pytest.raises(PendingRollbackError):
                registry.execute(text("SELECT 1"))
            savepoint.rollback()
            registry.add(Note(text="after"))
        assert sorted(notes(registry)) == ["after", "audit", "before"]


@pytest.mark.parametrize("error", [SystemExit, KeyError])
def test_an_interrupted_request_is_rolled_back_alone(
    registry: Registry, error: type[BaseException]
) -> None:
    """Its connection would be thrown away in production; the isolation's stays."""

    def work() -> None:
        registry.add(Note(text="lost"))
        registry.flush()
        raise error

    with isolate(registry) as outcomes:
        add(registry, "kept")
        with pytest.raises(error):
            request(make_app(work, registry))
        assert outcomes[-1].reason == "error"
        assert notes(registry) == ["kept"]


class Alarm(BaseException):
    pass


def test_an_interrupted_statement_ends_the_isolation(postgres_database: Database) -> None:
    """The answer may be on its way, so the connection is lost, and whoever goes on is told."""

    def interrupt(signum: int, frame: object) -> None:
        raise Alarm

    registry = make_registry(postgres_database.engine)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with problem("was lost"), isolate(registry):
            with pytest.raises(Alarm), session_scope(registry):
                signal.setitimer(signal.ITIMER_REAL, 0.2)
                registry.execute(text("SELECT pg_sleep(30)"))
            add(registry, "on what?")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    with isolate(registry):
        add(registry, "a new one")


def test_a_lost_connection_ends_the_isolation(
    postgres_database: Database, postgres_admin: postgres.Admin
) -> None:
    """What was done is gone with it, so each statement raises; the next isolation is sound."""
    registry = make_registry(postgres_database.engine)
    with problem("was lost"), isolate(registry):
        add(registry, "gone")
        postgres_admin.terminate()
        with pytest.raises(Exception, match="terminat"):
            notes(registry)
        notes(registry)
    with isolate(registry):
        assert notes(registry) == []


# -- SQLite ---------------------------------------------------------------------------------------


MODES: dict[str, dict[str, Any]] = {
    "as sqlite3 comes": {},
    "isolation_level=None": {"isolation_level": None},
    "isolation_level=IMMEDIATE": {"isolation_level": "IMMEDIATE"},
}
if sys.version_info >= (3, 12):
    MODES |= {"autocommit=True": {"autocommit": True}, "autocommit=False": {"autocommit": False}}


@pytest.mark.parametrize("options", [pytest.param(v, id=k) for k, v in MODES.items()])
def test_sqlite_needs_no_recipe(tmp_path: Path, options: dict[str, Any]) -> None:
    """In each mode of the driver, savepoints are savepoints and nothing remains."""
    engine = create_engine(f"sqlite:///{tmp_path / 'test.db'}", connect_args=options)
    Base.metadata.create_all(engine)
    registry = make_registry(engine)
    with isolate(registry):
        request(make_app(lambda: use_savepoints(registry), registry))
        assert notes(registry) == ["released", "left open"]
        request(make_app(lambda: add(registry, "x"), registry, status="400 Bad Request"))
        assert len(notes(registry)) == 3
    assert notes(registry) == []
    engine.dispose()


def test_sqlites_own_rollback_ends_the_isolation(sqlite_database: Database) -> None:
    """It undoes the outer transaction, so what follows would be committed."""
    registry = make_registry(sqlite_database.engine)
    with problem("was rolled back", "ON CONFLICT ROLLBACK"), isolate(registry):
        add(registry, "a")
        with contextlib.suppress(Exception), session_scope(registry):
            registry.execute(insert(Note).values(id=1).prefix_with("OR ROLLBACK"))
        add(registry, "b")
    assert sqlite_database.notes() == []
