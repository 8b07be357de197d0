"""Hooks run after the outcome, and what goes wrong in them changes nothing."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import event, select, text
from sqlalchemy.exc import IntegrityError

from tests.support.errors import AppError, Kill, fail, interrupt_by
from tests.support.models import Book, Database, Note
from tests.support.wsgi import assert_nothing_left
from wsgi_dbsession import current_scope, session_scope

if TYPE_CHECKING:
    from sqlalchemy.orm import Session, SessionTransaction, scoped_session

pytestmark = pytest.mark.promise("hooks")


def test_hooks_run_after_the_commit_in_order(
    database: Database, registry: scoped_session[Session]
) -> None:
    """They see the committed row, in the scope; those for a rollback are not called."""
    calls: list[object] = []
    with session_scope(registry) as scope:
        registry.add(Note(text="a"))
        scope.on_commit(lambda: calls.append(database.notes()))
        scope.on_rollback(lambda: calls.append("rollback"))
        scope.on_commit(lambda: calls.append(current_scope() is scope))
        scope.on_commit(lambda: calls.append(scope.outcome))
        assert calls == []

    assert calls == [["a"], True, "commit"]


def test_hooks_run_after_the_rollback_in_order(
    postgres_database: Database, postgres_registry: scoped_session[Session]
) -> None:
    """The row is gone, and its lock; those for a commit are not called."""
    calls: list[object] = []

    def rolled_back() -> None:
        postgres_registry.execute(text("LOCK TABLE note IN ACCESS EXCLUSIVE MODE NOWAIT"))
        calls.append(postgres_registry.scalars(select(Note)).all())

    with pytest.raises(AppError), session_scope(postgres_registry) as scope:
        postgres_registry.add(Note(text="a"))
        postgres_registry.flush()
        scope.on_rollback(rolled_back)
        scope.on_commit(lambda: calls.append("commit"))
        scope.on_rollback(lambda: calls.append(scope.outcome))
        raise AppError

    assert calls == [[], "rollback"]


def test_hooks_learn_that_the_commit_failed(
    database: Database, registry: scoped_session[Session]
) -> None:
    """A failed commit is a rollback for them."""
    calls: list[str] = []
    with pytest.raises(IntegrityError), session_scope(registry) as scope:
        scope.on_commit(lambda: calls.append("commit"))
        scope.on_rollback(lambda: calls.append("rollback"))
        registry.add(Book(author_id=7))

    assert calls == ["rollback"]


def test_a_hook_runs_though_no_session_was_used(sqlite_registry: scoped_session[Session]) -> None:
    """A commit of nothing counts."""
    calls: list[str] = []
    with session_scope(sqlite_registry) as scope:
        scope.on_commit(lambda: calls.append("commit"))

    assert calls == ["commit"]


@pytest.mark.parametrize("outcome", ["commit", "rollback"])
def test_an_error_in_a_hook_is_logged_only(
    sqlite_database: Database,
    sqlite_registry: scoped_session[Session],
    caplog: pytest.LogCaptureFixture,
    outcome: str,
) -> None:
    """The outcome stays, the other hooks run, and the log has the traceback."""
    calls: list[str] = []
    with session_scope(sqlite_registry) as scope:
        sqlite_registry.add(Note(text="a"))
        for register in (scope.on_commit, scope.on_rollback):
            register(fail)
            register(lambda: calls.append("next"))
        if outcome == "rollback":
            scope.doom()

    assert scope.outcome == outcome
    assert sqlite_database.notes() == (["a"] if outcome == "commit" else [])
    assert calls == ["next"]
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("wsgi_dbsession", logging.ERROR)
    assert record.getMessage() == f"session_scope: a hook failed after the {outcome}: {fail!r}"
    assert record.exc_info is not None
    assert record.exc_info[0] is AppError


@pytest.mark.parametrize("outcome", ["commit", "rollback"])
def test_an_interruption_in_a_hook_propagates(
    sqlite_database: Database, sqlite_registry: scoped_session[Session], outcome: str
) -> None:
    """A greenlet that is killed in a hook ends; the outcome stays, and nothing is left."""
    with pytest.raises(Kill), session_scope(sqlite_registry) as scope:
        sqlite_registry.add(Note(text="a"))
        scope.on_commit(interrupt_by(Kill()))
        scope.on_rollback(interrupt_by(Kill()))
        if outcome == "rollback":
            scope.doom()

    assert scope.outcome == outcome
    assert sqlite_database.notes() == (["a"] if outcome == "commit" else [])
    assert_nothing_left(sqlite_registry)


@pytest.mark.promise("first error")
def test_the_first_error_beats_an_interruption_in_a_hook(
    sqlite_registry: scoped_session[Session],
) -> None:
    """The error of the block propagates, not that of a hook after it."""
    with pytest.raises(AppError), session_scope(sqlite_registry) as scope:
        scope.on_rollback(interrupt_by(Kill()))
        raise AppError


@pytest.mark.promise("first error")
def test_an_interruption_in_a_hook_beats_the_failure_of_what_it_began(
    database: Database, registry: scoped_session[Session]
) -> None:
    """The second outcome fails, and the first error propagates."""

    def hook() -> None:
        registry.add(Book(author_id=7))
        raise Kill

    with pytest.raises(Kill), session_scope(registry) as scope:
        registry.add(Note(text="a"))
        scope.on_commit(hook)

    assert (scope.outcome, scope.reason) == ("rollback", "rolled back")
    assert database.notes() == ["a"]
    assert_nothing_left(registry)


def test_what_a_hook_writes_is_committed(
    database: Database, registry: scoped_session[Session]
) -> None:
    """A hook may begin a transaction, and register another hook, which runs too, and so on."""
    calls: list[str] = []
    with session_scope(registry) as scope:
        registry.add(Note(text="a"))

        def hook() -> None:
            registry.add(Note(text="hook"))
            scope.on_commit(lambda: scope.on_commit(last))

        def last() -> None:
            scope.on_commit(lambda: calls.append("last"))

        scope.on_commit(hook)

    assert calls == ["last"]
    assert database.notes() == ["a", "hook"]


def test_what_a_hook_writes_after_an_error_is_rolled_back(
    sqlite_database: Database, sqlite_registry: scoped_session[Session]
) -> None:
    """It is the work of the same failed scope."""
    with pytest.raises(AppError), session_scope(sqlite_registry) as scope:
        scope.on_rollback(lambda: sqlite_registry.add(Note(text="hook")))
        raise AppError

    assert sqlite_database.notes() == []


def test_what_hooks_begin_after_a_failed_commit_is_rolled_back(
    database: Database, registry: scoped_session[Session]
) -> None:
    """Also where no step follows that could do it; and a hook that one of them registers runs."""
    calls: list[str] = []

    def hook() -> None:
        registry.add(Note(text="hook"))
        scope.on_rollback(calls.append, "hook of the hook")
        scope.on_commit(calls.append, "never")

    with pytest.raises(IntegrityError), session_scope(registry) as scope:
        registry.add(Book(author_id=7))
        scope.on_rollback(hook)

    assert calls == ["hook of the hook"]
    assert scope.outcome == "rollback"
    assert isinstance(scope.failure, IntegrityError)
    assert database.notes() == []
    assert_nothing_left(registry)


@pytest.mark.parametrize("outcome", ["commit", "rollback"])
@pytest.mark.parametrize("work", [True, False], ids=["and writes", "only"])
def test_a_hook_that_registers_itself_comes_to_an_end(
    sqlite_database: Database,
    sqlite_registry: scoped_session[Session],
    outcome: str,
    work: bool,
) -> None:
    """It is called after each outcome that it asks for, but not for ever."""
    calls: list[str] = []

    def hook() -> None:
        calls.append("hook")
        if work:
            sqlite_registry.add(Note(text="hook"))
        getattr(scope, f"on_{outcome}")(hook)

    with (
        pytest.raises(RuntimeError, match="over 100 subsequent outcomes of one scope"),
        session_scope(sqlite_registry) as scope,
    ):
        getattr(scope, f"on_{outcome}")(hook)
        if outcome == "rollback":
            scope.doom()

    assert len(calls) == 100
    assert scope.outcome == outcome
    kept = 99 if outcome == "commit" and work else 0
    assert sqlite_database.notes() == ["hook"] * kept


def test_a_hook_of_a_hook_runs_after_what_that_one_has_written(
    database: Database, registry: scoped_session[Session]
) -> None:
    """It waits for the next outcome, so it sees the row, or learns that there is none."""
    seen: list[object] = []
    with session_scope(registry) as scope:

        def hook(row: Note | Book) -> None:
            registry.add(row)
            scope.on_commit(lambda: seen.append(database.notes()))
            scope.on_rollback(lambda: seen.append("rollback"))

        registry.add(Note(text="a"))
        scope.on_commit(hook, Note(text="b"))

    assert seen == [["a", "b"]]

    with pytest.raises(IntegrityError), session_scope(registry) as scope:
        scope.on_commit(hook, Book(author_id=7))

    assert seen[1:] == ["rollback"]


def test_a_listener_that_begins_anew_after_each_rollback_is_no_endless_loop(
    sqlite_registry: scoped_session[Session],
) -> None:
    """What it reads is rolled back as well, and then that is the end."""
    calls: list[str] = []

    def read(session: Session, _: object) -> None:
        if not calls[9:]:
            calls.append("read")
            session.execute(text("SELECT 1"))

    event.listen(sqlite_registry.session_factory, "after_soft_rollback", read)
    with pytest.raises(AppError), session_scope(sqlite_registry):
        sqlite_registry.execute(text("SELECT 1"))
        raise AppError

    assert calls[:2] == ["read", "read"]
    assert len(calls) < 9


def test_what_listeners_begin_after_each_commit_is_committed(
    sqlite_database: Database, sqlite_registry: scoped_session[Session]
) -> None:
    """However often they do, as long as it comes to an end."""

    def write(session: Session, transaction: SessionTransaction) -> None:
        number = int(session.info.get("number", 0))
        if transaction.parent is None and number < 4:
            session.info["number"] = number + 1
            session.add(Note(text=str(number)))

    event.listen(sqlite_registry.session_factory, "after_transaction_end", write)
    with session_scope(sqlite_registry) as scope:
        sqlite_registry.add(Note(text="a"))

    assert scope.outcome == "commit"
    assert sqlite_database.notes() == ["0", "1", "2", "3", "a"]


def test_what_a_listener_begins_after_an_unknown_outcome_changes_nothing(
    sqlite_database: Database, sqlite_registry: scoped_session[Session]
) -> None:
    """It is rolled back, and the scope's outcome stays what it is."""
    dialect = sqlite_database.engine.dialect
    original = dialect.do_commit

    def do_commit(_: object) -> None:
        setattr(dialect, "do_commit", original)  # noqa: B010 - mypy refuses the assignment
        raise OSError(9, "broken")

    def write(session: Session, transaction: SessionTransaction) -> None:
        if transaction.parent is None and not session.info:
            session.info["wrote"] = True
            session.add(Note(text="listener"))

    setattr(dialect, "do_commit", do_commit)  # noqa: B010 - likewise
    event.listen(sqlite_registry.session_factory, "after_transaction_end", write)
    with pytest.raises(OSError, match="broken"), session_scope(sqlite_registry) as scope:
        sqlite_registry.add(Note(text="a"))

    assert (scope.outcome, scope.reason) == ("unknown", "unknown")
    assert sqlite_database.notes() == []


@pytest.mark.promise("first error")
def test_the_first_error_beats_the_endless_loop(sqlite_registry: scoped_session[Session]) -> None:
    """A hook that registers itself, and fails."""

    def hook() -> None:
        scope.on_commit(hook)
        raise Kill

    with pytest.raises(Kill), session_scope(sqlite_registry) as scope:
        scope.on_commit(hook)


def test_a_hook_gets_its_arguments(sqlite_registry: scoped_session[Session]) -> None:
    """The very objects, in order, so a method of a queue needs no lambda."""
    calls: list[tuple[object, ...]] = []
    argument: list[str] = []
    with session_scope(sqlite_registry) as scope:
        scope.on_commit(lambda *arguments: calls.append(arguments), argument, 1)
        scope.on_rollback(lambda *arguments: calls.append(arguments), "rollback")
        scope.on_commit(lambda *arguments: calls.append(arguments))
        argument.append("late")

    assert calls == [(argument, 1), ()]
    assert calls[0][0] is argument


@pytest.mark.parametrize("outcome", ["commit", "rollback"])
def test_an_interruption_in_a_hook_skips_no_other(
    sqlite_registry: scoped_session[Session],
    caplog: pytest.LogCaptureFixture,
    outcome: str,
) -> None:
    """The others run, the log names the hook, and the first interruption propagates."""
    calls: list[str] = []
    first, second = Kill("first"), SystemExit("second")
    interrupt = interrupt_by(first)
    with pytest.raises(Kill, match="first"), session_scope(sqlite_registry) as scope:
        register = scope.on_commit if outcome == "commit" else scope.on_rollback
        register(calls.append, "before")
        register(interrupt)
        register(calls.append, "between")
        register(interrupt_by(second))
        register(calls.append, "after")
        if outcome == "rollback":
            scope.doom()

    assert calls == ["before", "between", "after"]
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2
    assert f"a hook failed after the {outcome}: {interrupt!r}" in caplog.text
    assert_nothing_left(sqlite_registry)
