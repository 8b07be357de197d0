"""Isolation leaves no row, and the application does not notice; outcomes are visible."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sqlite3
import sys
import threading
from typing import TYPE_CHECKING, Any

import falcon.testing
import flask
import pytest
from psycopg.adapt import Dumper
from sqlalchemy import Connection, Engine, create_engine, event, func, insert, select, text
from sqlalchemy.exc import DatabaseError, IntegrityError, PendingRollbackError
from sqlalchemy.orm import Session as SQLAlchemySession
from sqlalchemy.orm import scoped_session, sessionmaker
from sqlalchemy.pool import StaticPool
from webtest import TestApp
from werkzeug.test import Client

from tests.models import Author, Base, Book, Database, Note, make_engine
from wsgi_dbsession import NoScopeError, SessionMiddleware, current_scope, session_scope
from wsgi_dbsession.testing import isolate, record_outcomes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path
    from typing import TypeAlias

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    from tests import postgres

Registry: TypeAlias = "scoped_session[SQLAlchemySession]"


def make_registry(engine: Engine | Connection | None, **options: Any) -> Registry:
    return scoped_session(sessionmaker(engine, **options), scopefunc=current_scope)


@pytest.fixture
def registry(database: Database) -> Registry:
    """A registry on each database."""
    return make_registry(database.engine)


def make_app(
    work: Callable[[], object], *registries: Registry, status: str = "200 OK", **options: Any
) -> WSGIApplication:
    """Make an application that does some work and answers with a status."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        work()
        start_response(status, [("Content-Type", "text/plain")])
        return [b"done"]

    return SessionMiddleware(app, *registries, **options)


def request(app: WSGIApplication, method: str = "POST") -> int:
    return Client(app).open("/work", method=method, buffered=True).status_code


def notes(registry: Registry) -> list[str]:
    """Return what a scope of its own sees, as a test would look."""
    with session_scope(registry):
        return list(registry.scalars(select(Note.text).order_by(Note.id)))


def add(registry: Registry, *texts: str) -> None:
    with session_scope(registry):
        registry.add_all(Note(text=each) for each in texts)


@contextlib.contextmanager
def problem(*parts: str) -> Iterator[None]:
    """Expect the report of an isolation, with these words in it."""
    with pytest.raises(RuntimeError) as caught:
        yield
    for part in parts:
        assert part in str(caught.value)


# -- nothing remains ------------------------------------------------------------------------------


def _commit_by_hand(registry: Registry) -> None:
    registry.add(Note(text="by hand"))
    registry.commit()
    registry.add(Note(text="and once more"))


def _roll_back_in_between(registry: Registry) -> None:
    registry.add(Note(text="given up"))
    registry.flush()
    registry.rollback()
    registry.add(Note(text="second try"))


def _use_savepoints(registry: Registry) -> None:
    with registry.begin_nested():
        registry.add(Note(text="released"))
    savepoint = registry.begin_nested()
    registry.add(Note(text="given up"))
    registry.flush()
    savepoint.rollback()
    registry.begin_nested()
    registry.add(Note(text="left open"))


@pytest.mark.parametrize(
    ("work", "seen"),
    [
        pytest.param(lambda r: r.add(Note(text="a")), ["a"], id="the middleware commits"),
        pytest.param(_commit_by_hand, ["by hand", "and once more"], id="the application commits"),
        pytest.param(_roll_back_in_between, ["second try"], id="the application rolls back"),
        pytest.param(_use_savepoints, ["released", "left open"], id="savepoints"),
        pytest.param(lambda r: r.execute(insert(Note), [{"text": "a"}]), ["a"], id="Core"),
        pytest.param(
            lambda r: r.execute(text("INSERT INTO note (text) VALUES ('a')")), ["a"], id="text"
        ),
        pytest.param(
            lambda r: r.connection().execute(insert(Note), {"text": "a"}),
            ["a"],
            id="the Session's connection",
        ),
    ],
)
def test_a_request_is_committed_for_the_test_and_nothing_remains(
    database: Database, registry: Registry, work: Callable[[Registry], object], seen: list[str]
) -> None:
    """What a request commits, the next scope sees; after the isolation it is gone."""
    app = make_app(lambda: work(registry), registry)
    for _ in range(2):
        with isolate(registry) as outcomes:
            assert request(app) == 200
            assert notes(registry) == seen
            assert outcomes[0].outcome == "commit"

        assert database.notes() == []


@pytest.mark.parametrize("status", ["400 Bad Request", "500 Internal Server Error"])
def test_a_request_that_rolls_back_leaves_nothing_to_the_next(
    registry: Registry, status: str
) -> None:
    """A rollback undoes the request's work, and not what was committed before."""
    app = make_app(lambda: registry.add(Note(text="lost")), registry, status=status)
    with isolate(registry) as outcomes:
        add(registry, "kept")
        request(app)

        assert notes(registry) == ["kept"]
        assert (outcomes[1].outcome, outcomes[1].reason) == ("rollback", "veto")


def test_what_was_there_before_is_there_afterwards(database: Database, registry: Registry) -> None:
    """Changes and deletions of earlier rows are undone, too."""
    add(registry, "one", "two")
    with isolate(registry):
        with session_scope(registry):
            for note in registry.scalars(select(Note)).all()[1:]:
                registry.delete(note)
            registry.scalars(select(Note)).one().text = "changed"
        assert notes(registry) == ["changed"]

    assert database.notes() == ["one", "two"]
    assert notes(registry) == ["one", "two"]


def test_an_error_in_the_block_undoes_it_all_the_same(
    database: Database, registry: Registry
) -> None:
    """The error propagates, and the registry works as before."""
    with pytest.raises(ZeroDivisionError), isolate(registry):
        add(registry, "gone")
        raise ZeroDivisionError

    assert database.notes() == []
    add(registry, "stays")
    assert database.notes() == ["stays"]


def test_tables_made_in_the_isolation_are_gone(database: Database, registry: Registry) -> None:
    """SQLite and PostgreSQL undo statements that define tables."""
    with isolate(registry), session_scope(registry):
        registry.execute(text("CREATE TABLE made (id INTEGER)"))
        registry.execute(text("INSERT INTO made VALUES (1)"))

    with database.engine.connect() as connection:
        assert not database.engine.dialect.has_table(connection, "made")


def test_the_test_sees_the_database_and_no_identity_map(registry: Registry) -> None:
    """An object of the request's Session is another than that of the test's."""
    made: list[Note] = []

    def work() -> None:
        note = Note(text="flushed")
        registry.add(note)
        registry.flush()
        note.text = "only in memory"
        made.append(note)
        current_scope().doom()

    with isolate(registry):
        request(make_app(work, registry))
        with session_scope(registry):
            assert registry.scalars(select(Note)).all() == []
        add(registry, "a")
        with session_scope(registry):
            assert registry.scalars(select(Note)).one() is not made[0]


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
        assert outcomes[0].reason == "commit failed"
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
        assert [each.reason for each in outcomes] == ["commit failed", "commit failed", "complete"]
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
    """What was done is gone with it, so nobody goes on; the next isolation is sound."""
    registry = make_registry(postgres_database.engine)
    with problem("was lost"), isolate(registry):
        add(registry, "gone")
        postgres_admin.terminate()
        with pytest.raises(Exception, match="terminat"):
            notes(registry)
        notes(registry)
    with isolate(registry):
        assert notes(registry) == []


# -- several registries ---------------------------------------------------------------------------


@pytest.mark.parametrize("doomed", [False, True], ids=["committed", "rolled back"])
@pytest.mark.parametrize("swap", [False, True], ids=["first first", "second first"])
@pytest.mark.parametrize("twophase", [False, True], ids=["one-phase", "one of them two-phase"])
def test_two_registries_share_the_connection_of_one_engine(
    database: Database, doomed: bool, swap: bool, twophase: bool
) -> None:
    """Their transactions lie in one another, and end in whatever order."""
    one = make_registry(database.engine)
    two = make_registry(database.engine, twophase=twophase)

    def work() -> None:
        for registry, word in ((one, "a"), (two, "b"), (one, "c"), (two, "d")):
            registry.add(Note(text=word))
            registry.flush()
        if doomed:
            current_scope().doom()

    with isolate(one, two) as outcomes:
        request(make_app(work, *((two, one) if swap else (one, two))))
        assert outcomes[0].outcome == ("rollback" if doomed else "commit")
        assert notes(one) == notes(two) == ([] if doomed else ["a", "b", "c", "d"])
    assert database.notes() == []


def test_two_registries_may_share_a_factory(database: Database, registry: Registry) -> None:
    """The factory is bound once, and once back."""
    other: Registry = scoped_session(registry.session_factory, scopefunc=current_scope)
    with isolate(registry, other):
        add(registry, "a")
        assert notes(other) == ["a"]
    add(other, "b")
    assert database.notes() == ["b"]


def test_engines_that_share_a_pool_share_the_connection(database: Database) -> None:
    """An engine with other execution options is the same one here, for it has the same pool."""
    one = make_registry(database.engine)
    two = make_registry(database.engine.execution_options(logging_token="two"))
    with isolate(one, two):
        add(one, "a")
        assert notes(two) == ["a"]
    assert database.notes() == []


@pytest.fixture
def both(postgres_database: Database, other_postgres_database: Database) -> list[Database]:
    return [postgres_database, other_postgres_database]


@pytest.mark.parametrize("failing", [None, 0, 1], ids=["no one fails", "first", "second"])
def test_two_phase_transactions_over_two_databases_are_one(
    both: list[Database], failing: int | None
) -> None:
    """None is committed if one of them cannot be prepared."""
    registries = [make_registry(each.engine, twophase=True) for each in both]

    def work() -> None:
        for number, registry in enumerate(registries):
            registry.add(Note(text="x"))
            if number == failing:
                registry.add(Book(author_id=7))

    with isolate(*registries):
        request(make_app(work, *registries, commit_error=make_app(int, registries[0])))
        for registry in registries:
            assert notes(registry) == (["x"] if failing is None else [])
    for each in both:
        assert each.notes() == []


def test_a_prepared_transaction_survives_no_failure_of_a_one_phase_one(
    both: list[Database],
) -> None:
    """The two-phase one is prepared, the one-phase one fails, the former is rolled back."""
    prepared = make_registry(both[0].engine, twophase=True)
    plain = make_registry(both[1].engine)

    with isolate(prepared, plain):
        with pytest.raises(IntegrityError), session_scope(prepared, plain):
            prepared.add(Note(text="prepared"))
            plain.add(Book(author_id=7))
        assert notes(prepared) == []


def test_a_registry_with_binds_is_isolated_in_each_engine(both: list[Database]) -> None:
    """Each engine that a table or class is bound to has its connection."""
    registry = make_registry(
        None, binds={Note: both[0].engine, Author: both[1].engine, Book: both[1].engine}
    )
    with isolate(registry):
        with session_scope(registry):
            registry.add_all([Note(text="a"), Author(name="b")])
        with session_scope(registry):
            assert registry.scalars(select(Author.name)).all() == ["b"]
    for each in both:
        assert each.notes() == each.committed(Author.name) == []


def test_a_session_class_that_chooses_its_engine_is_isolated(both: list[Database]) -> None:
    """Whatever its get_bind() returns is replaced, and the class is the old one afterwards."""
    chosen: list[Engine] = []

    class Choosing(SQLAlchemySession):
        def get_bind(self, *arguments: Any, **options: Any) -> Engine | Connection:
            return chosen[-1] if chosen else super().get_bind(*arguments, **options)

    registry = make_registry(both[0].engine, class_=Choosing)
    before = registry.session_factory.class_
    with isolate(registry):
        add(registry, "by its bind")
        chosen.append(both[1].engine)
        add(registry, "a")
        with isolate(registry):
            add(registry, "b")
            assert notes(registry) == ["a", "b"]
            with session_scope(registry):
                assert isinstance(registry(), Choosing)
        assert notes(registry) == ["a"]

    assert registry.session_factory.class_ is before
    for each in both:
        assert each.notes() == []


# -- nested isolation -----------------------------------------------------------------------------


def test_an_inner_isolation_undoes_only_its_own(database: Database, registry: Registry) -> None:
    """A module's rows are there for each of its tests, and gone after the last one."""
    with isolate(registry) as outer:
        add(registry, "for all")
        for word in ("one", "two"):
            with isolate(registry) as inner:
                add(registry, word)
                assert notes(registry) == ["for all", word]
            assert len(inner) == 2
        assert notes(registry) == ["for all"]
    assert len(outer) == 1 + 4 + 1
    assert database.notes() == []


def test_an_inner_isolation_may_take_in_more_registries(database: Database) -> None:
    """One more registry on the same engine works on the outer isolation's connection."""
    one, two = make_registry(database.engine), make_registry(database.engine)
    with isolate(one):
        add(one, "outer")
        with isolate(two, one):
            add(two, "inner")
            assert notes(one) == ["outer", "inner"]
        assert notes(one) == ["outer"]
    add(two, "not isolated any more")
    assert database.notes() == ["not isolated any more"]


def test_an_open_transaction_around_an_inner_isolation_is_undone_with_it(
    registry: Registry,
) -> None:
    """If it wrote in the inner one, it cannot go on as if it had not lost that."""
    told = pytest.raises(RuntimeError, match="is undone")
    with isolate(registry), told, session_scope(registry):
        registry.add(Note(text="before"))
        registry.flush()
        with isolate(registry):
            registry.add(Note(text="lost"))
            registry.flush()
        registry.add(Note(text="after"))


def test_an_open_transaction_that_only_read_goes_on(registry: Registry) -> None:
    """It has lost nothing by the end of the inner isolation."""
    with isolate(registry):
        with session_scope(registry):
            registry.add(Note(text="before"))
            registry.flush()
            with isolate(registry):
                savepoint = registry.begin_nested()
                registry.scalars(select(Note)).all()
            savepoint.commit()
            registry.add(Note(text="after"))
        assert notes(registry) == ["before", "after"]


# -- transactions in one another ------------------------------------------------------------------


def test_a_block_in_a_request_is_committed_before_it(registry: Registry) -> None:
    """Both are committed, or the inner one alone is rolled back."""

    def work() -> None:
        registry.add(Note(text="request"))
        registry.flush()
        add(registry, "audit")
        with session_scope(registry) as scope:
            registry.add(Note(text="doomed"))
            scope.doom()

    with isolate(registry):
        request(make_app(work, registry))
        assert notes(registry) == ["request", "audit"]


def test_a_committed_block_survives_a_request_that_wrote_only_after_it(
    registry: Registry,
) -> None:
    """As in production: the request has only read before."""

    def work() -> None:
        notes_before = registry.scalars(select(Note)).all()
        assert notes_before == []
        with registry.begin_nested():
            add(registry, "audit")
        registry.add(Note(text="lost"))
        registry.flush()

    with isolate(registry) as outcomes:
        request(make_app(work, registry, status="400 Bad Request"))
        assert [each.outcome for each in outcomes] == ["rollback", "commit"]
        assert notes(registry) == ["audit"]


def test_a_committed_block_that_is_undone_is_reported(
    database: Database, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    """One connection cannot keep the inner one's work and undo the outer one's: it says so."""

    def work() -> None:
        registry.add(Note(text="lost"))
        registry.flush()
        for word in ("audit", "another"):
            add(registry, word)

    told = problem("has undone what", f"{__file__}:", "in work", "in add", "production")
    with told, isolate(registry):
        request(make_app(work, registry, status="400 Bad Request"))
        assert notes(registry) == []
    assert "has undone what" in caplog.text
    assert database.notes() == []


@pytest.mark.parametrize("nested", [False, True], ids=["outer isolation", "inner isolation"])
def test_the_tests_own_open_transaction_undoes_no_request(
    registry: Registry, nested: bool
) -> None:
    """A test that has read something, and lets go of it later, is the usual case."""
    with isolate(registry) if nested else contextlib.nullcontext(), isolate(registry):
        with session_scope(registry) as scope:
            registry.scalars(select(Note)).all()
            request(make_app(lambda: registry.add(Note(text="a")), registry))
            assert registry.scalars(select(Note.text)).all() == ["a"]
            request(make_app(lambda: registry.add(Note(text="b")), registry))
            scope.doom()
        assert notes(registry) == ["a", "b"]


def test_a_transaction_that_lies_in_one_that_is_rolled_back_is_undone(
    registry: Registry,
) -> None:
    """Its commit must not look as if it had saved something."""
    with isolate(registry):
        outer, inner = registry.session_factory(), registry.session_factory()
        outer.add(Note(text="outer"))
        outer.flush()
        inner.add(Note(text="inner"))
        inner.flush()
        outer.rollback()
        with pytest.raises(RuntimeError, match="is undone"):
            inner.scalars(select(Note)).all()
        with pytest.raises(RuntimeError, match="is undone"):
            inner.commit()
        inner.rollback()
        inner.add(Note(text="second try"))
        inner.commit()
        assert notes(registry) == ["second try"]
        outer.close()
        inner.close()


def test_a_reader_in_one_that_is_rolled_back_goes_on(registry: Registry) -> None:
    """It has lost nothing, and its own rollback works still."""
    with isolate(registry):
        outer, inner = registry.session_factory(), registry.session_factory()
        outer.add(Note(text="outer"))
        outer.flush()
        assert inner.scalars(select(Note.text)).all() == ["outer"]
        outer.rollback()
        assert inner.scalars(select(Note.text)).all() == []
        inner.add(Note(text="inner"))
        inner.flush()
        inner.rollback()
        assert notes(registry) == []
        outer.close()
        inner.close()


def test_a_rollback_of_nothing_undoes_nothing(registry: Registry) -> None:
    """A reader ends while another one, begun later, has written."""
    with isolate(registry):
        reader, writer = registry.session_factory(), registry.session_factory()
        reader.scalars(select(Note)).all()
        writer.add(Note(text="a"))
        writer.flush()
        reader.rollback()
        writer.commit()
        assert notes(registry) == ["a"]
        reader.close()
        writer.close()


def test_savepoints_of_an_outer_transaction_end_in_any_order(registry: Registry) -> None:
    """Another transaction that began in a savepoint may outlive it."""
    with isolate(registry):
        outer, inner = registry.session_factory(), registry.session_factory()
        savepoint = outer.begin_nested()
        outer.add(Note(text="outer"))
        outer.flush()
        inner.add(Note(text="inner"))
        inner.flush()
        savepoint.commit()
        outer.commit()
        inner.commit()
        assert notes(registry) == ["outer", "inner"]
        outer.close()
        inner.close()


# -- bound, and bound back ------------------------------------------------------------------------


def test_core_on_the_sessions_engine_is_isolated(database: Database, registry: Registry) -> None:
    """``get_bind()`` returns an engine, with its own connections, options and inspection."""
    with isolate(registry):
        with session_scope(registry):
            engine = registry.get_bind()
            assert isinstance(engine, Engine)
        with engine.begin() as connection:
            connection.execute(insert(Note).values(text="a"))
        with engine.execution_options(
            isolation_level="SERIALIZABLE", schema_translate_map={"x": None}
        ).connect() as connection:
            assert connection.scalar(select(func.count(Note.id))) == 1
            connection.execute(insert(Note).values(text="not committed"))
        assert notes(registry) == ["a"]
        Base.metadata.create_all(engine)
    assert database.notes() == []


def test_the_isolation_level_is_that_of_the_outer_transaction(registry: Registry) -> None:
    """What can only be said at the begin of a transaction is not said again."""
    with isolate(registry):
        add(registry, "a")
        with session_scope(registry):
            registry.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
            registry.add(Note(text="b"))
        assert notes(registry) == ["a", "b"]


@pytest.mark.parametrize("by", ["create_engine", "execution_options"])
def test_an_engine_in_autocommit_mode_is_isolated(postgres_database: Database, by: str) -> None:
    """Its connection is in a transaction all the same, and in autocommit mode afterwards."""
    engine = create_engine(
        postgres_database.url,
        **({"isolation_level": "AUTOCOMMIT"} if by == "create_engine" else {}),
    )
    if by == "execution_options":
        engine = engine.execution_options(isolation_level="AUTOCOMMIT")
    registry = make_registry(engine)
    with isolate(registry):
        add(registry, "gone")
    assert postgres_database.notes() == []
    with engine.connect() as connection:
        connection.execute(insert(Note).values(text="stays"))
    assert postgres_database.notes() == ["stays"]
    engine.dispose()


def test_the_binding_is_the_old_one_afterwards(database: Database, registry: Registry) -> None:
    """Options of the factory are those from before, also where the block failed to begin."""
    unbound = make_registry(None)
    options = dict(registry.session_factory.kw)
    with isolate(registry):
        assert registry.session_factory.kw["bind"] is not database.engine
    with pytest.raises(ValueError, match="not bound to an engine"), isolate(registry, unbound):
        pytest.fail("it must not begin")
    assert registry.session_factory.kw == options


def test_an_engine_bound_meanwhile_stays(database: Database, registry: Registry) -> None:
    """An application that is made in the isolation and configures its registry keeps that."""
    with isolate(registry):
        registry.session_factory.configure(bind=database.observer)
        with pytest.raises(RuntimeError, match="past the isolation"):
            add(registry, "outside")
    assert registry.session_factory.kw["bind"] is database.observer
    assert database.notes() == []


def test_a_session_from_before_is_refused(database: Database, registry: Registry) -> None:
    """It would work on a connection of its own, and commit."""
    with pytest.raises(RuntimeError, match="past the isolation"), session_scope(registry):
        registry()
        with isolate(registry):
            registry.add(Note(text="outside"))
            registry.flush()
    assert database.notes() == []


def test_a_registry_bound_to_a_connection_is_refused(database: Database) -> None:
    """Somebody has begun to write their own isolation."""
    with database.engine.connect() as connection:
        registry = make_registry(connection)
        with pytest.raises(TypeError, match="bound to a Connection"), isolate(registry):
            pytest.fail("it must not begin")


def test_what_is_no_registry_is_refused(database: Database) -> None:
    """The errors are those of ``session_scope``."""
    for block in (isolate, record_outcomes):
        with pytest.raises(TypeError, match="scoped_session"), block(database):  # type: ignore[arg-type]
            pytest.fail("it must not begin")
        with pytest.raises(ValueError, match="no session registry"), block():
            pytest.fail("it must not begin")


def test_a_begin_that_fails_gives_its_connection_back(tmp_path: Path) -> None:
    """No connection stays checked out."""
    path = tmp_path / "test.db"
    path.write_bytes(b"no database at all, but long enough to be looked at as if it were one" * 9)
    engine = create_engine(f"sqlite:///{path}", pool_size=1, max_overflow=0, pool_timeout=1)
    event.listen(engine, "connect", lambda driver, _: driver.execute("PRAGMA foreign_keys=ON"))
    registry = make_registry(engine)
    for _ in range(2):
        with pytest.raises(DatabaseError, match="not a database"), isolate(registry):
            pytest.fail("it must not begin")
    engine.dispose()


def test_isolations_may_end_in_the_wrong_order(database: Database, registry: Registry) -> None:
    """With the outer one, the inner one is over, too."""
    outer, inner = isolate(registry), isolate(registry)
    outer.__enter__()
    inner.__enter__()
    add(registry, "a")
    outer.__exit__(None, None, None)
    inner.__exit__(None, None, None)
    assert registry.session_factory.kw["bind"] is database.engine
    assert notes(registry) == []


def test_a_connection_that_cannot_be_made_leaves_nothing_behind(tmp_path: Path) -> None:
    """The error is the driver's, and the registry is as it was."""
    engine = create_engine(f"sqlite:///{tmp_path / 'missing' / 'test.db'}")
    registry = make_registry(engine)
    with pytest.raises(Exception, match="unable to open"), isolate(registry):
        pytest.fail("it must not begin")
    assert registry.session_factory.kw["bind"] is engine


@pytest.mark.parametrize(
    "statement",
    ["COMMIT", " rollback", "END", "ABORT", "ROLLBACK TRANSACTION", "PREPARE TRANSACTION 'x'"],
)
def test_textual_ends_of_the_outer_transaction_are_refused(
    registry: Registry, statement: str
) -> None:
    """They would end it behind everybody's back."""
    with isolate(registry):
        with session_scope(registry):
            with pytest.raises(RuntimeError, match="outer transaction"):
                registry.execute(text(statement))
            registry.add(Note(text="a"))
        assert notes(registry) == ["a"]


def test_textual_savepoints_are_no_ends(registry: Registry) -> None:
    """Those are within the transaction."""
    with isolate(registry), session_scope(registry):
        for statement in ("SAVEPOINT x", "ROLLBACK TO SAVEPOINT x", "RELEASE SAVEPOINT x"):
            registry.execute(text(statement))


def test_a_raw_connection_is_refused(registry: Registry) -> None:
    """The pool would give another one, outside of the isolation."""
    with isolate(registry), session_scope(registry):
        engine = registry.get_bind()
        assert isinstance(engine, Engine)
        with pytest.raises(RuntimeError, match="outside of the isolation"):
            engine.raw_connection()


def test_listeners_see_what_they_see_in_production(database: Database) -> None:
    """A counter of statements counts the application's, and none of the isolation's."""
    registry = make_registry(database.engine)
    seen: list[str] = []

    @event.listens_for(database.engine, "before_cursor_execute")
    def _(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if not statement.startswith("BEGIN"):  # SQLAlchemy's recipe for SQLite
            seen.append(statement)

    for name in ("commit", "rollback", "savepoint", "rollback_savepoint", "release_savepoint"):

        def listen(*arguments: Any, name: str = name) -> None:
            seen.append(name)

        event.listen(database.engine, name, listen)

    def work() -> None:
        with registry.begin_nested():
            registry.execute(insert(Note).values(id=1))
        savepoint = registry.begin_nested()
        registry.execute(insert(Note).values(id=2))
        savepoint.rollback()
        registry.commit()
        registry.scalars(select(Note)).all()

    def run() -> list[str]:
        seen.clear()
        request(make_app(work, registry, status="400 Bad Request"))
        # In production the statements of savepoints are seen, besides the events.
        return [each for each in seen if "SAVEPOINT" not in each]

    with isolate(registry):
        isolated = run()
    assert isolated == run()
    assert len(isolated) > 7


def test_a_listener_may_use_the_connection(database: Database, registry: Registry) -> None:
    """It does so in the midst of the statement that it is told of, as in production."""

    @event.listens_for(database.engine, "before_cursor_execute")
    def look(connection: Connection, cursor: Any, statement: str, *rest: Any) -> None:
        if statement.startswith("INSERT"):
            savepoint = connection.begin_nested()
            connection.exec_driver_sql("DELETE FROM note")
            savepoint.rollback()

    with isolate(registry):
        for word in ("a", "b"):
            add(registry, word)
        assert notes(registry) == ["a", "b"]


def test_begin_listeners_work_in_each_transaction(postgres_database: Database) -> None:
    """``SET LOCAL`` at the begin of each transaction is a usual one."""
    engine = postgres_database.engine
    registry, two_phase = make_registry(engine), make_registry(engine, twophase=True)

    begun: list[object] = []

    @event.listens_for(engine, "begin")
    def set_name(connection: Connection) -> None:
        connection.execute(text("SET LOCAL application_name = 'listener'"))

    event.listen(engine, "begin_twophase", lambda connection, xid: begun.append(xid))
    with isolate(registry, two_phase):
        for _ in range(2):
            with session_scope(registry) as scope:
                assert registry.scalar(text("SHOW application_name")) == "listener"
                scope.doom()
        add(two_phase, "a")
        assert len(begun) == 1


def test_a_begin_that_fails_leaves_no_transaction(postgres_database: Database) -> None:
    """Neither does the failure of a listener."""
    registry = make_registry(postgres_database.engine)
    fail = [True]

    @event.listens_for(postgres_database.engine, "begin")
    def _(connection: Connection) -> None:
        if fail:
            raise ZeroDivisionError

    with isolate(registry):
        with pytest.raises(ZeroDivisionError):
            add(registry, "a")
        fail.clear()
        add(registry, "b")
        assert notes(registry) == ["b"]


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
        request(make_app(lambda: _use_savepoints(registry), registry))
        assert notes(registry) == ["released", "left open"]
        request(make_app(lambda: add(registry, "x"), registry, status="400 Bad Request"))
        assert len(notes(registry)) == 3
    assert notes(registry) == []
    engine.dispose()


def test_sqlites_own_rollback_ends_the_isolation(sqlite_database: Database) -> None:
    """It undoes the outer transaction, so what follows would be committed."""
    registry = make_registry(sqlite_database.engine)
    with problem("SQLite has rolled back"), isolate(registry):
        add(registry, "a")
        with contextlib.suppress(Exception), session_scope(registry):
            registry.execute(insert(Note).values(id=1).prefix_with("OR ROLLBACK"))
        add(registry, "b")
    assert sqlite_database.notes() == []


# -- threads --------------------------------------------------------------------------------------


def run_in_thread(work: Callable[[], object]) -> list[BaseException]:
    """Run it in another thread, and return the error if there was one."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    return errors


def test_a_request_in_another_thread_is_isolated(database: Database, registry: Registry) -> None:
    """A live server's thread works on the same connection."""
    app = make_app(lambda: registry.add(Note(text="a")), registry)
    with isolate(registry) as outcomes:
        assert run_in_thread(lambda: request(app)) == []
        assert notes(registry) == ["a"]
        assert outcomes[0].name == "POST /work"
    assert database.notes() == []


def test_transactions_of_several_threads_take_turns(
    database: Database, registry: Registry
) -> None:
    """Each waits for the others, so that each commits and rolls back its own."""

    def work(number: int) -> None:
        for each in range(10):
            with session_scope(registry) as scope:
                registry.add(Note(text=f"{number}"))
                registry.flush()
                if each % 2:
                    scope.doom()

    with isolate(registry, wait=60):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(notes(registry)) == sorted("0123" * 5)
    assert database.notes() == []


def test_a_thread_that_waits_in_vain_says_for_what(registry: Registry) -> None:
    """The usual reason is a transaction that the test itself holds open."""
    with isolate(registry, wait=0.05):
        with session_scope(registry):
            registry.add(Note(text="held"))
            registry.flush()
            (error,) = run_in_thread(lambda: notes(registry))
            assert isinstance(error, RuntimeError)
            assert f"begun at {__file__}:" in str(error)
            assert "take turns" in str(error)
        assert notes(registry) == ["held"]


def test_the_steps_of_a_response_may_move_between_threads(registry: Registry) -> None:
    """Who used a transaction last is whose it is."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [])
        registry.add(Note(text="a"))
        registry.flush()
        yield b"first"
        registry.add(Note(text="b"))
        registry.flush()
        yield b"second"
        assert len(registry.scalars(select(Note)).all()) == 2

    with isolate(registry, wait=0.05):
        response = iter(SessionMiddleware(app, registry)({}, lambda *_: len))
        assert next(response) == b"first"
        assert run_in_thread(lambda: next(response)) == []
        with pytest.raises(RuntimeError, match="take turns"):
            notes(registry)
        assert list(response) == []
        assert notes(registry) == ["a", "b"]


@pytest.mark.parametrize("shared", [True, False], ids=["one database", "one for each thread"])
def test_in_memory_sqlite_is_shared_by_threads_or_says_how(shared: bool) -> None:
    """SQLAlchemy's default gives each thread an empty database of its own."""
    engine = (
        create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
        if shared
        else create_engine("sqlite://")
    )
    Base.metadata.create_all(engine)
    registry = make_registry(engine)
    with isolate(registry):
        errors = run_in_thread(lambda: add(registry, "a"))
        if shared:
            assert errors == []
        else:
            assert "poolclass=StaticPool" in str(errors[0])
        assert notes(registry) == (["a"] if shared else [])
    assert notes(registry) == []
    engine.dispose()


def test_a_forked_process_is_refused(registry: Registry) -> None:
    """It would speak on its parent's connection."""
    with isolate(registry):
        add(registry, "a")
        child = os.fork()
        if child == 0:
            code = 1
            try:
                notes(registry)
            except RuntimeError as error:
                code = 0 if "forked" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        assert notes(registry) == ["a"]


# -- outcomes -------------------------------------------------------------------------------------


def _doom() -> None:
    current_scope().doom()


def _keep() -> None:
    current_scope().keep()


def _raise() -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("work", "status", "seen"),
    [
        pytest.param(int, "200 OK", "commit, complete", id="success"),
        pytest.param(int, "404 Not Found", "rollback, veto", id="status"),
        pytest.param(_doom, "200 OK", "rollback, doomed", id="doomed"),
        pytest.param(_keep, "403 Forbidden", "commit, kept", id="kept"),
        pytest.param(_raise, "200 OK", "rollback, error", id="error"),
    ],
)
def test_why_is_one_line(work: Callable[[], None], status: str, seen: str) -> None:
    """Outcome and reason of each scope are visible."""
    registry = make_registry(create_engine("sqlite://"))

    def use() -> None:
        registry()
        work()

    app = make_app(use, registry, status=status)
    with record_outcomes(registry) as outcomes, contextlib.suppress(ZeroDivisionError):
        request(app, "PUT")

    assert repr(outcomes) == f"[<PUT /work: {seen}>]"
    assert f"{outcomes[0].outcome}, {outcomes[0].reason}" == seen
    assert outcomes[0].ended


def test_a_scope_without_a_session_is_seen() -> None:
    """There was nothing to decide, as in production."""
    registry = make_registry(create_engine("sqlite://"))
    with record_outcomes(registry) as outcomes:
        request(make_app(int, registry, status="404 Not Found"), "GET")

    assert repr(outcomes) == "[<GET /work: nothing to decide>]"
    assert outcomes[0].outcome is None


def test_hooks_that_ran_are_seen(caplog: pytest.LogCaptureFixture) -> None:
    """Each with its own name, the failed ones too, and none that did not run."""
    registry = make_registry(create_engine("sqlite://"))

    def sent() -> None:
        pass

    def undone() -> None:
        pass

    with record_outcomes(registry) as outcomes:
        for doomed in (False, True):
            with session_scope(registry) as scope:
                scope.on_commit(sent)
                scope.on_commit(_raise)
                scope.on_rollback(undone)
                if doomed:
                    scope.doom()

    assert [each.hooks for each in outcomes] == [[sent, _raise], [undone]]
    assert repr(_raise) in caplog.text


def test_a_stream_may_have_more_than_one_outcome() -> None:
    """What it does after its commit gets an outcome of its own."""
    registry = make_registry(create_engine("sqlite://"))

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [])
        registry.execute(select(1))
        yield b"first"
        registry.execute(select(1))
        current_scope().doom()
        yield b"second"

    with isolate(registry) as outcomes:
        request(SessionMiddleware(app, registry, commit_on="headers"), "GET")

    assert outcomes[0].settled == [("commit", "complete"), ("rollback", "doomed")]
    assert (outcomes[0].outcome, outcomes[0].reason) == ("commit", "complete")


def test_an_undecided_scope_is_seen(registry: Registry) -> None:
    """Scopes are listed in the order in which they were opened."""
    with record_outcomes(registry) as outcomes, session_scope(registry) as outer:
        with session_scope(registry):
            assert repr(outcomes) == "[<session_scope: undecided>, <session_scope: undecided>]"
        assert outcomes[0].scope is outer
        assert outcomes[1].scope is None
        assert [each.ended for each in outcomes] == [False, True]
    assert f"{__file__}:" in outcomes[0].opened


def test_a_scope_of_several_registries_is_listed_once(database: Database) -> None:
    """In each list there is, of an outer and of an inner block, whichever registry it is for."""
    one, two = make_registry(database.engine), make_registry(database.engine)
    with record_outcomes(one, two) as outer:
        with record_outcomes(two) as inner:
            for registries in ([one, two], [one], [two]):
                with session_scope(*registries):
                    pass
        with session_scope(one, two):
            pass
    with session_scope(one, two):
        pass
    assert (len(outer), len(inner)) == (4, 2)


# -- clients --------------------------------------------------------------------------------------


def _with_werkzeug(app: WSGIApplication) -> str:
    return Client(app).post("/notes").text


def _with_webtest(app: WSGIApplication) -> str:
    found: str = TestApp(app).post("/notes").text
    return found


def _with_falcon(app: WSGIApplication) -> str:
    return falcon.testing.TestClient(app).simulate_post("/notes").text


def _with_flask(app: WSGIApplication) -> str:
    flask_app = flask.Flask("test")
    flask_app.wsgi_app = app  # type: ignore[method-assign, assignment]
    with flask_app.test_client() as client:
        return client.post("/notes").text


@pytest.mark.parametrize("post", [_with_werkzeug, _with_webtest, _with_falcon, _with_flask])
def test_every_test_client_will_do(
    database: Database, registry: Registry, post: Callable[[WSGIApplication], str]
) -> None:
    """What matters is the application, not who calls it."""
    app = make_app(lambda: registry.add(Note(text="a")), registry)
    with isolate(registry) as outcomes:
        for _ in range(2):
            assert post(app) == "done"
        assert notes(registry) == ["a", "a"]
        assert [each.name for each in outcomes[:2]] == ["POST /notes"] * 2
    assert database.notes() == []


# -- leaks ----------------------------------------------------------------------------------------


def _stream(registry: Registry, *, savepoint: bool = False) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [])
        with registry.begin_nested() if savepoint else contextlib.nullcontext():
            registry.add(Note(text="half"))
            registry.flush()
            yield b"first"
            yield b"second"

    return SessionMiddleware(app, registry)


def test_a_response_that_was_not_closed_is_reported(
    database: Database, registry: Registry
) -> None:
    """With the line of the test that opened it; the next isolation is sound."""
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/stream"}
    told = problem("scope of GET /stream", f"{__file__}:", "in test_a_response")
    with told, isolate(registry) as outcomes:
        response = _stream(registry)(environ, lambda *_: len)
        next(iter(response))
    assert outcomes[0].reason == "incomplete"

    with isolate(registry):
        add(registry, "a")
        response.close()  # type: ignore[attr-defined]
        assert notes(registry) == ["a"]
    assert database.notes() == []


def test_a_response_that_nobody_has_any_more_is_no_leak(registry: Registry) -> None:
    """Also if it lies in a cycle that waits for the collector."""
    with isolate(registry) as outcomes:
        gc.disable()
        try:
            response: list[Any] = [_stream(registry)({}, lambda *_: len)]
            next(iter(response[0]))
            response.append(response)
            del response
            assert not outcomes[0].ended
        finally:
            gc.enable()
    assert outcomes[0].reason == "incomplete"


@pytest.mark.parametrize("savepoint", [False, True], ids=["plain", "in a savepoint"])
def test_a_response_may_be_collected_in_the_midst_of_a_statement(
    tmp_path: Path, savepoint: bool
) -> None:
    """Its rollback, on the same connection, waits for the end of the statement."""
    engine = make_engine(f"sqlite:///{tmp_path / 'test.db'}")
    registry = make_registry(engine)
    kept: list[Iterable[bytes]] = []

    def collect() -> int:
        kept.clear()
        return len(kept)

    event.listen(
        engine, "connect", lambda driver, _: driver.create_function("collect", 0, collect)
    )
    Base.metadata.create_all(engine)

    with isolate(registry) as outcomes:
        kept.append(_stream(registry, savepoint=savepoint)({}, lambda *_: len))
        next(iter(kept[0]))
        with session_scope(registry):
            assert registry.scalar(select(func.count(Note.id), func.collect())) == 1
            assert outcomes[0].reason == "incomplete"
            assert registry.scalar(select(func.count(Note.id))) == 0
            registry.begin_nested()
            registry.add(Note(text="a"))
        assert notes(registry) == ["a"]
    engine.dispose()


@pytest.mark.parametrize("savepoint", [False, True], ids=["plain", "in a savepoint"])
def test_a_response_may_be_collected_while_psycopg_holds_its_lock(
    postgres_database: Database, savepoint: bool
) -> None:
    """A rollback there and then would wait for the lock for ever."""
    registry = make_registry(postgres_database.engine)
    kept: list[Iterable[bytes]] = []

    class Collects:
        pass

    class CollectsDumper(Dumper):
        oid = 25  # text

        def dump(self, value: Collects) -> bytes:
            kept.clear()
            return b"collected"

    with isolate(registry) as outcomes:
        kept.append(_stream(registry, savepoint=savepoint)({}, lambda *_: len))
        next(iter(kept[0]))
        with session_scope(registry):
            driver: Any = registry.connection().connection.dbapi_connection
            driver.adapters.register_dumper(Collects, CollectsDumper)
            assert registry.scalar(text("SELECT :x"), {"x": Collects()}) == "collected"
            assert outcomes[0].reason == "incomplete"
            assert registry.scalar(select(func.count(Note.id))) == 0


def test_a_response_that_was_read_but_not_closed_is_no_leak(registry: Registry) -> None:
    """Test clients do that; its outcome is known."""
    with isolate(registry) as outcomes:
        response = _stream(registry)({}, lambda *_: len)
        assert list(response) == [b"first", b"second"]
        assert not outcomes[0].ended
    assert outcomes[0].outcome == "commit"
    assert outcomes[0].ended


def test_a_block_that_was_not_left_is_reported(database: Database, registry: Registry) -> None:
    """It is left now, so that the next test has no scope of this one."""
    told = problem("scope of session_scope", f"{__file__}:", "in test_a_block")
    with told, isolate(registry) as outcomes:
        for word in ("outer", "inner"):
            session_scope(registry).__enter__()
            registry.add(Note(text=word))
            registry.flush()
        session_scope(registry).__enter__()  # which nobody uses
    assert [each.reason for each in outcomes] == ["incomplete", "incomplete", None]
    with pytest.raises(NoScopeError):
        current_scope()
    assert database.notes() == []


def test_a_block_in_a_suspended_generator_is_reported(
    database: Database, registry: Registry
) -> None:
    """It is at work somewhere else, and finds its connection gone when it goes on."""

    def generator() -> Iterator[None]:
        with session_scope(registry):
            registry.add(Note(text="a"))
            registry.flush()
            yield
            registry.execute(select(1))

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [])
        inner = generator()
        next(inner)
        yield b""
        yield from (b"" for _ in inner)

    with problem("scope of session_scope", "a transaction was never"), isolate(registry):
        response = iter(SessionMiddleware(app, registry)({}, lambda *_: len))
        next(response)
    with pytest.raises(RuntimeError, match="is over"):
        next(response)
    assert database.notes() == []


@pytest.mark.parametrize("nested", [False, True], ids=["outer isolation", "inner isolation"])
def test_a_session_that_was_not_closed_is_reported(
    database: Database, registry: Registry, nested: bool
) -> None:
    """One that the test made without a scope, with the line that used it."""
    with contextlib.ExitStack() as stack:
        if nested:
            stack.enter_context(isolate(registry))
        told = problem("a transaction was never ended", f"{__file__}:", "in test_a_session")
        with told, isolate(registry):
            session = registry.session_factory()
            session.add(Note(text="a"))
            session.flush()
        for work in (lambda: session.execute(select(1)), session.commit):
            with pytest.raises(RuntimeError, match="is over"):
                work()
        session.close()
        if nested:
            assert notes(registry) == []
    assert database.notes() == []


def test_an_outer_transaction_is_no_leak_of_the_inner_isolation(registry: Registry) -> None:
    """Only what began in the block has to end in it."""
    with isolate(registry), session_scope(registry):
        registry.add(Note(text="a"))
        registry.flush()
        with isolate(registry):
            pass


def test_an_error_of_the_test_comes_before_the_report(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    """The leak is most likely its consequence, so it is logged only."""
    with caplog.at_level(logging.ERROR), pytest.raises(ZeroDivisionError), isolate(registry):
        session_scope(registry).__enter__()
        raise ZeroDivisionError
    assert "never ended" in caplog.text


def test_a_place_is_named_even_if_only_libraries_were_there(registry: Registry) -> None:
    """A thread whose target is a library's function has no line of the test's."""
    block = session_scope(registry)
    with record_outcomes(registry) as outcomes:
        thread = threading.Thread(target=block.__enter__, name="worker 7")
        thread.start()
        thread.join()
    assert outcomes[0].opened == "worker 7, in a library"


def test_isolation_needs_no_pytest() -> None:
    """Whoever uses another test runner need not install it."""
    script = "import sys, wsgi_dbsession.testing; sys.exit('pytest' in sys.modules)"
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", script]) == 0
