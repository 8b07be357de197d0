"""What else is run again by choice, and for how long."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm.exc import StaleDataError

from tests.retry.applications import Restless, flask_app, list_app, protect
from tests.support.errors import AppError, Kill
from tests.support.models import Author, Database, Note, make_engine
from tests.support.wsgi import drive, make_registry
from wsgi_dbsession import session_scope
from wsgi_dbsession.retry import Retry, run_transaction

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed.wsgi import WSGIApplication
    from sqlalchemy.orm import Session, scoped_session


# -- by choice ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [list_app, flask_app], ids=["raised", "error page"])
def test_a_stale_row_is_run_again_by_choice(
    shape: Callable[[Callable[[], object]], WSGIApplication],
    sqlite_database: Database,
) -> None:
    """Optimistic locking is no error of the database, so it takes a predicate."""
    engine = sqlite_database.engine
    registry = make_registry(engine)
    attempts: list[None] = []
    with session_scope(registry):
        registry.add(Author(id=1))

    def work() -> None:
        attempts.append(None)
        author = registry.get(Author, 1)
        assert author is not None
        author.name += "changed"
        if len(attempts) == 1:
            # Somebody else deletes the row, as far as this attempt can see.
            registry.connection().execute(text("DELETE FROM author"))
        registry.flush()

    def commit_and_work() -> None:
        with session_scope(registry):
            registry.add(Note(text="kept"))
        work()

    def is_stale(error: BaseException) -> bool:
        return isinstance(error, StaleDataError)

    app = shape(work)
    if shape is list_app:
        with pytest.raises(StaleDataError):
            drive(protect(app, registry), "POST")
    else:
        assert drive(protect(app, registry), "POST").status[:3] == "500"
    assert len(attempts) == 1

    attempts.clear()
    assert drive(protect(app, registry, on=is_stale), "POST").body == b"done"
    assert sqlite_database.committed(Author.name) == ["changed"]

    # Not even then, if something was committed.
    attempts.clear()
    app = protect(shape(commit_and_work), registry, on=is_stale)
    if shape is list_app:
        with pytest.raises(StaleDataError):
            drive(app, "POST")
    else:
        assert drive(app, "POST").status[:3] == "500"
    assert len(attempts) == 1


def test_a_locked_sqlite_database_is_run_again_by_choice(sqlite_database: Database) -> None:
    """SQLite says with a message only that somebody else writes."""
    engine = make_engine(sqlite_database.url, connect_args={"timeout": 0})
    registry = make_registry(engine)
    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        with contextlib.ExitStack() as stack:
            if len(attempts) == 1:
                # Not by an engine: that may commit.
                path = str(sqlite_database.url.database)
                other = stack.enter_context(contextlib.closing(sqlite3.connect(path)))
                other.execute("INSERT INTO note (text) VALUES ('theirs')")
            registry.add(Note(text="mine"))
            registry.flush()

    def is_locked(error: BaseException) -> bool:
        return isinstance(error, OperationalError) and "database is locked" in str(error.orig)

    with pytest.raises(OperationalError):
        drive(protect(list_app(work), registry), "POST")
    attempts.clear()
    assert drive(protect(list_app(work), registry, on=is_locked), "POST").body == b"done"

    engine.dispose()
    assert (len(attempts), sqlite_database.notes()) == (2, ["mine"])


class _SpecialError(StaleDataError):
    """A subclass counts, too."""


@pytest.mark.parametrize(
    ("on", "attempts"),
    [
        pytest.param(StaleDataError, 3, id="a class"),
        pytest.param((KeyError, StaleDataError), 3, id="a tuple of classes"),
        pytest.param(lambda error: "stale" in str(error), 3, id="a function"),
        pytest.param(KeyError, 1, id="another class"),
        pytest.param((), 1, id="no class"),
        pytest.param(lambda error: False, 1, id="a function that says no"),
    ],
)
@pytest.mark.parametrize("caused", [False, True], ids=["the error", "its cause"])
def test_what_else_is_retried_is_a_class_a_tuple_or_a_function(
    caused: bool, on: Any, attempts: int, plain: scoped_session[Session]
) -> None:
    """As ``on`` is in other libraries that retry; what caused an error counts."""
    seen: list[None] = []

    def work() -> None:
        seen.append(None)
        error = _SpecialError("stale")
        if caused:
            raise ValueError from error
        raise error

    with pytest.raises(ValueError if caused else _SpecialError):
        drive(protect(list_app(work), plain, on=on))
    assert len(seen) == attempts
    seen.clear()
    with pytest.raises(ValueError if caused else _SpecialError):
        run_transaction(work, plain, on=on, backoff=0)
    assert len(seen) == attempts


@pytest.mark.parametrize(
    "on",
    [
        pytest.param("40001", id="a code"),
        pytest.param(int, id="a class that is no error"),
        pytest.param(KeyboardInterrupt, id="an interruption"),
        pytest.param((StaleDataError, "40001"), id="a tuple with a code"),
        pytest.param((StaleDataError, lambda error: True), id="a tuple with a function"),
        pytest.param(None, id="None"),
    ],
)
def test_anything_else_is_refused(on: Any, plain: scoped_session[Session]) -> None:
    """When the application is built, with the fix."""
    message = "on must be an exception class, a tuple of them, or callable, got .*. Pass"
    with pytest.raises(TypeError, match=message):
        protect(list_app(lambda: None), plain, on=on)


@pytest.mark.parametrize("shape", [list_app, flask_app], ids=["raised", "error page"])
def test_a_choice_that_fails_replaces_no_error(
    shape: Callable[[Callable[[], object]], WSGIApplication],
    sqlite_database: Database,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The client gets what it would have got, and the log says why ``on`` had no say."""
    registry = make_registry(sqlite_database.engine)
    attempts: list[None] = []

    def on(error: Exception) -> bool:
        raise LookupError

    def work() -> None:
        attempts.append(None)
        registry.add(Note(text="lost"))
        registry.flush()
        registry.execute(text("SELECT nonsense"))

    app = protect(shape(work), registry, on=on)
    if shape is list_app:
        with pytest.raises(OperationalError):
            drive(app, "POST")
    else:
        assert drive(app, "POST").status[:3] == "500"

    assert len(attempts) == 1
    assert sqlite_database.notes() == []
    records = [record for record in caplog.records if record.name == "wsgi_dbsession"]
    assert {record.levelname for record in records} == {"ERROR"}
    assert "which failed for OperationalError" in records[0].getMessage()
    assert records[0].exc_info is not None
    assert isinstance(records[0].exc_info[1], LookupError)


def test_an_interruption_is_not_asked_for_its_cause(plain: scoped_session[Session]) -> None:
    """A function gets what it can mean: an ``Exception``."""
    asked: list[Exception] = []

    def on(error: Exception) -> bool:
        asked.append(error)
        return False

    def work() -> None:
        raise AppError from Kill()

    with pytest.raises(AppError):
        drive(protect(list_app(work), plain, on=on))
    assert [type(error) for error in asked] == [AppError]


# -- time -----------------------------------------------------------------------------------------


def delays_of(caplog: pytest.LogCaptureFixture) -> list[float]:
    return [
        float(record.getMessage().split()[-2])
        for record in caplog.records
        if "next in" in record.getMessage()
    ]


def test_the_delay_is_random_below_a_limit_that_doubles(
    plain: scoped_session[Session], caplog: pytest.LogCaptureFixture
) -> None:
    """Exponential backoff with full jitter, up to a largest limit."""
    caplog.set_level(logging.INFO)
    limits = [0.001, 0.002, 0.004, 0.005, 0.005, 0.005, 0.005]
    for _ in range(5):
        with pytest.raises(Retry):
            drive(
                protect(list_app(Restless()), plain, attempts=8, backoff=0.001, backoff_max=0.005)
            )
    delays = delays_of(caplog)
    assert len(delays) == 5 * 7
    assert all(0 <= delay <= limits[number % 7] for number, delay in enumerate(delays))
    assert len(set(delays)) > 3


def test_no_attempt_begins_when_time_is_up(
    plain: scoped_session[Session], caplog: pytest.LogCaptureFixture
) -> None:
    """``timeout`` bounds the time that a client waits for the last attempt to begin."""
    caplog.set_level(logging.INFO)
    work = Restless()
    with pytest.raises(Retry):
        drive(protect(list_app(work), plain, timeout=0))
    assert work.attempts == 1

    work = Restless()
    with pytest.raises(Retry):
        drive(
            protect(
                list_app(work),
                plain,
                attempts=10**6,
                backoff=1000,
                backoff_max=1000,
                timeout=0.05,
            )
        )
    assert work.attempts >= 2
    assert max(delays_of(caplog)) <= 0.05


def test_a_pause_lets_other_greenlets_run() -> None:
    """Under gevent the pause yields, also if the module was imported before the patching."""
    script = """
import wsgi_dbsession.retry
from gevent import monkey
monkey.patch_all()
import gevent
from sqlalchemy import create_engine
from sqlalchemy.orm import scoped_session, sessionmaker
from wsgi_dbsession import current_scope
from wsgi_dbsession.retry import Retry, run_transaction

Session = scoped_session(sessionmaker(create_engine("sqlite://")), scopefunc=current_scope)
other = []

def work():
    if not other:
        raise Retry

def run():
    run_transaction(work, Session, attempts=100, backoff=0.02, backoff_max=0.02)

pausing = gevent.spawn(run)
gevent.spawn(other.append, None)
pausing.get(timeout=10)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
