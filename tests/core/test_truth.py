"""The truth about a failed commit: rolled back, unknown, committed, or partly committed."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from tests.support.errors import AppError, Kill, notes_of, raise_kill
from tests.support.models import Author, Book, Database, Note, make_engine
from tests.support.wsgi import ask, make_registry
from wsgi_dbsession import Scope, SessionMiddleware, current_scope, session_scope

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from sqlalchemy import Engine
    from sqlalchemy.orm import Session, scoped_session

    Registry = scoped_session[Session]

pytestmark = pytest.mark.promise("truth")


def hooked(hooks: list[str]) -> None:
    scope = current_scope()
    scope.on_commit(hooks.append, "commit")
    scope.on_rollback(hooks.append, "rollback")


def fails_in(engine: Engine, method: str, error: BaseException, *, after: bool = False) -> None:
    """Let a method of the dialect fail, before or after the database has done its part."""
    original = getattr(engine.dialect, method)

    def do_commit(*arguments: Any, **options: Any) -> None:
        setattr(engine.dialect, method, original)
        if after:
            original(*arguments, **options)
        raise error

    setattr(engine.dialect, method, do_commit)


@pytest.fixture
def engine(postgres_database: Database) -> Iterator[Engine]:
    """An engine of the test's own, whose dialect it may break."""
    engine = make_engine(postgres_database.url)
    yield engine
    engine.dispose()


@pytest.fixture
def other_engine(other_postgres_database: Database) -> Iterator[Engine]:
    """A second one, over another database."""
    engine = make_engine(other_postgres_database.url)
    yield engine
    engine.dispose()


def work(registry: Registry, hooks: list[str]) -> None:
    hooked(hooks)
    registry.add(Note(text="a"))


# -- rolled back ----------------------------------------------------------------------------------


def test_a_refused_commit_is_rolled_back(
    postgres_registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    """The database answered, and answered no."""
    hooks: list[str] = []
    with pytest.raises(IntegrityError) as caught, session_scope(postgres_registry) as scope:
        hooked(hooks)
        postgres_registry.add(Book(author_id=7))

    assert (scope.outcome, scope.reason) == ("rollback", "rolled back")
    assert scope.failure is caught.value
    assert notes_of(caught.value) == ["session_scope: commit failed, rolled back"]
    assert hooks == ["rollback"]
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage().startswith("session_scope: commit failed, rolled back: ")


def test_a_savepoint_that_was_released_is_no_commit(postgres_registry: Registry) -> None:
    """SQLAlchemy calls the same listeners for it."""
    with pytest.raises(IntegrityError), session_scope(postgres_registry) as scope:
        postgres_registry.begin_nested()
        postgres_registry.add(Book(author_id=7))

    assert (scope.outcome, scope.reason) == ("rollback", "rolled back")


@pytest.mark.parametrize("error", [AppError(), Kill(), OSError(9, "mine")], ids=repr)
def test_nothing_was_sent_where_a_listener_fails_before(
    postgres_registry: Registry, error: BaseException
) -> None:
    """So it is no unknown outcome, whatever kind of error it is."""

    def listen(_: Session) -> None:
        raise error

    event.listen(postgres_registry.session_factory, "before_commit", listen)
    hooks: list[str] = []

    with pytest.raises(type(error)), session_scope(postgres_registry) as scope:
        work(postgres_registry, hooks)

    assert (scope.outcome, scope.reason) == ("rollback", "rolled back")
    assert hooks == ["rollback"]


def test_autocommit_is_not_called_rolled_back(
    postgres_database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """The log does not say that the row is gone."""
    engine = make_engine(postgres_database.url, isolation_level="AUTOCOMMIT")
    registry = make_registry(engine)

    def listen(_: Session) -> None:
        raise AppError

    event.listen(registry.session_factory, "before_commit", listen)

    with pytest.raises(AppError), session_scope(registry):
        registry.add(Note(text="kept"))

    assert postgres_database.notes() == ["kept"]
    assert "commit failed, but AUTOCOMMIT keeps what was written" in caplog.text
    engine.dispose()


# -- unknown --------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [False, True], ids=["lost before", "lost after"])
@pytest.mark.parametrize("error", [OSError(9, "broken"), AppError(), Kill()], ids=repr)
def test_what_comes_out_of_commit_is_unknown(
    engine: Engine,
    postgres_database: Database,
    caplog: pytest.LogCaptureFixture,
    error: BaseException,
    after: bool,
) -> None:
    """An error of the socket that the driver let through, or an interruption: no hook runs."""
    registry = make_registry(engine)
    hooks: list[str] = []
    fails_in(engine, "do_commit", error, after=after)

    with pytest.raises(type(error)) as caught, session_scope(registry) as scope:
        work(registry, hooks)

    assert (scope.outcome, scope.reason) == ("unknown", "unknown")
    assert scope.failure is caught.value
    assert hooks == []
    assert notes_of(caught.value)[-1].endswith("connection lost during COMMIT, outcome unknown")
    assert "connection lost during COMMIT, outcome unknown" in caplog.text
    assert postgres_database.notes() == (["a"] if after else [])


@pytest.mark.parametrize(
    ("lost", "truth"), [(True, "unknown"), (False, "rolled back")], ids=["lost", "answered"]
)
def test_an_error_of_commit_may_have_no_code(engine: Engine, lost: bool, truth: str) -> None:
    """SQLAlchemy asks its driver whether the connection was lost."""
    registry = make_registry(engine)

    def do_commit(connection: Any) -> None:
        if lost:
            connection.dbapi_connection.close()
        raise engine.dialect.loaded_dbapi.OperationalError

    setattr(engine.dialect, "do_commit", do_commit)  # noqa: B010 - mypy refuses it
    with pytest.raises(OperationalError), session_scope(registry) as scope:
        registry.add(Note(text="a"))

    assert scope.reason == truth


@pytest.mark.parametrize(
    "code",
    [
        pytest.param({"C": "08007"}, id="08007, transaction resolution unknown"),
        pytest.param({"C": "57P01"}, id="57P01, an operator ended the process"),
        pytest.param({"C": "40003"}, id="40003, statement completion unknown"),
        # 60 of 60 such requests were committed.
        pytest.param(1180, id="1180 of Galera"),
        pytest.param(1047, id="1047 of Galera"),
    ],
)
def test_an_answer_to_commit_may_leave_it_unknown(engine: Engine, code: object) -> None:
    """Its code says so, where SQLAlchemy takes the connection for a good one."""
    registry = make_registry(engine)
    original = engine.dialect.loaded_dbapi.OperationalError()
    original.args = (code, "Got error during COMMIT")
    fails_in(engine, "do_commit", original)

    with pytest.raises(OperationalError), session_scope(registry) as scope:
        registry.add(Note(text="a"))

    assert (scope.outcome, scope.reason) == ("unknown", "unknown")


# -- committed ------------------------------------------------------------------------------------


def fail_afterwards(_: Session) -> None:
    raise AppError


@pytest.mark.parametrize("early", [True, False], ids=["before adoption", "after adoption"])
def test_a_listener_that_fails_afterwards_does_not_undo_it(
    postgres_database: Database, caplog: pytest.LogCaptureFixture, early: bool
) -> None:
    """The work is saved and the hooks run; the error propagates."""
    registry = make_registry(postgres_database.engine)
    if not early:
        session_scope(registry)
    event.listen(registry.session_factory, "after_commit", fail_afterwards)
    hooks: list[str] = []

    with pytest.raises(AppError) as caught, session_scope(registry) as scope:
        work(registry, hooks)

    assert (scope.outcome, scope.reason) == ("commit", "committed")
    assert scope.failure is caught.value
    assert hooks == ["commit"]
    assert postgres_database.notes() == ["a"]
    assert "session_scope: committed, but something failed afterwards" in caplog.text
    assert "rollback failed" not in caplog.text


def test_a_hook_may_work_after_that(postgres_database: Database) -> None:
    """SQLAlchemy leaves such a Session half-way; it is closed, and begins anew."""
    registry = make_registry(postgres_database.engine)
    failures = [AppError()]

    def listen(_: Session) -> None:
        if failures:
            raise failures.pop()

    event.listen(registry.session_factory, "after_commit", listen)

    with pytest.raises(AppError), session_scope(registry):
        current_scope().on_commit(lambda: registry.add(Note(text="hook")))
        registry.add(Note(text="a"))

    assert postgres_database.notes() == ["a", "hook"]


def test_the_others_are_committed_nevertheless(
    postgres_database: Database, other_postgres_database: Database
) -> None:
    """Listeners do not leave the work half done; the first error propagates."""
    first = make_registry(postgres_database.engine)
    second = make_registry(other_postgres_database.engine)
    event.listen(first.session_factory, "after_commit", fail_afterwards)
    event.listen(second.session_factory, "after_commit", raise_kill)

    with pytest.raises(AppError), session_scope(first, second) as scope:
        first.add(Note(text="a"))
        second.add(Note(text="b"))

    assert (scope.outcome, scope.reason) == ("commit", "committed")
    assert (postgres_database.notes(), other_postgres_database.notes()) == (["a"], ["b"])


# -- partly committed -----------------------------------------------------------------------------


def test_a_later_commit_that_fails_leaves_the_work_half_done(
    two: tuple[Registry, Registry],
    postgres_database: Database,
    other_postgres_database: Database,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Neither kind of hook knows what to do then."""
    first, second = two
    hooks: list[str] = []

    with pytest.raises(IntegrityError) as caught, session_scope(first, second) as scope:
        work(first, hooks)
        second.add(Book(author_id=7))

    assert (scope.outcome, scope.reason) == ("partial", "partly committed")
    assert hooks == []
    words = "partly committed, 1 transactions before the failed one"
    assert notes_of(caught.value)[-1] == f"session_scope: {words}"
    assert words in caplog.text
    assert (postgres_database.notes(), other_postgres_database.notes()) == (["a"], [])


def test_one_session_over_two_databases_may_be_half_done(
    engine: Engine, other_engine: Engine
) -> None:
    """It has a transaction in each, and commits one after the other."""
    registry = make_registry(engine, binds={Note: engine, Author: other_engine})
    session_scope(registry)
    failed: list[object] = []

    def do_commit(connection: Any) -> None:
        failed.append(connection)
        if len(failed) == 2:
            raise type(original_error)(*original_error.args)
        connection.commit()

    original_error = engine.dialect.loaded_dbapi.IntegrityError("no")
    for each in (engine, other_engine):
        setattr(each.dialect, "do_commit", do_commit)  # noqa: B010 - mypy refuses the assignment

    with pytest.raises(DBAPIError) as caught, session_scope(registry) as scope:
        registry.add_all([Note(text="a"), Author(name="b")])

    assert (scope.outcome, scope.reason) == ("partial", "partly committed")
    assert "partly committed, 1 transactions" in notes_of(caught.value)[-1]


def test_prepared_transactions_are_named(
    engine: Engine, other_engine: Engine, postgres_admin: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The decision was made: what could not be carried out waits for whoever resolves it."""
    first = make_registry(other_engine)
    second = make_registry(engine, twophase=True)
    fails_in(engine, "do_commit_twophase", OSError(9, "broken"))

    with pytest.raises(OSError, match="broken"), session_scope(first, second) as scope:
        first.add(Note(text="a"))
        second.add(Note(text="b"))

    assert (scope.outcome, scope.reason) == ("partial", "partly committed")
    (gid,) = postgres_admin.prepared()
    assert gid in caplog.text
    assert any(gid in note for note in notes_of(scope.failure or AppError()))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(f"COMMIT PREPARED '{gid}'"))


# -- what goes to the log -------------------------------------------------------------------------


def test_a_record_has_fields_for_machines(
    postgres_registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    """Method, path, outcome and reason; control characters of the client are escaped."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        postgres_registry.add(Book(author_id=7))
        start_response("201 Created", [])
        return []

    ask(SessionMiddleware(app, postgres_registry), "POST", "/a\nERROR forged")

    (record,) = caplog.records
    fields = vars(record)
    assert fields["method"] == "POST"
    assert fields["path"] == "/a\\nERROR forged"
    assert fields["scope"] == "POST /a\\nERROR forged"
    assert (fields["outcome"], fields["reason"]) == ("rollback", "rolled back")
    assert "\n" not in record.getMessage().split("commit failed")[0]


def test_a_failure_of_what_a_hook_began_is_told(
    sqlite_database: Database, sqlite_registry: Registry
) -> None:
    """The first outcome stands; what the hook wrote is rolled back, and the error propagates."""
    with pytest.raises(IntegrityError), session_scope(sqlite_registry) as scope:
        scope.on_commit(lambda: sqlite_registry.add(Book(author_id=7)))
        sqlite_registry.add(Note(text="kept"))

    assert sqlite_database.notes() == ["kept"]
    assert isinstance(scope, Scope)
    assert scope.reason == "rolled back"


def test_the_oldest_pythons_have_notes_too(sqlite_registry: Registry) -> None:
    """``add_note()`` came with Python 3.11; others read the attribute that it writes."""
    error = AppError()
    error.__notes__ = ["mine"]  # type: ignore[attr-defined]

    def listen(_: Session) -> None:
        raise error

    event.listen(sqlite_registry.session_factory, "before_commit", listen)
    with pytest.raises(AppError), session_scope(sqlite_registry):
        sqlite_registry.add(Note(text="a"))

    assert notes_of(error)[0] == "mine"
    assert len(notes_of(error)) == 2
