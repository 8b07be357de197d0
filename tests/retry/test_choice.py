"""What else is run again by choice, and for how long."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm.exc import StaleDataError

from tests.retry.applications import Restless, flask_app, list_app, protect
from tests.support.models import Author, Database, Note, make_engine
from tests.support.wsgi import drive, make_registry
from wsgi_dbsession import session_scope
from wsgi_dbsession.retry import Retry

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
    assert drive(protect(app, registry, also=is_stale), "POST").body == b"done"
    assert sqlite_database.committed(Author.name) == ["changed"]

    # Not even then, if something was committed.
    attempts.clear()
    app = protect(shape(commit_and_work), registry, also=is_stale)
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
    assert drive(protect(list_app(work), registry, also=is_locked), "POST").body == b"done"

    engine.dispose()
    assert (len(attempts), sqlite_database.notes()) == (2, ["mine"])


# -- time -----------------------------------------------------------------------------------------


def delays_of(caplog: pytest.LogCaptureFixture) -> list[float]:
    return [
        float(record.getMessage().split()[-2])
        for record in caplog.records
        if "the next one begins in" in record.getMessage()
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
                protect(list_app(Restless()), plain, attempts=8, backoff=0.001, max_backoff=0.005)
            )
    delays = delays_of(caplog)
    assert len(delays) == 5 * 7
    assert all(0 <= delay <= limits[number % 7] for number, delay in enumerate(delays))
    assert len(set(delays)) > 3


def test_no_attempt_begins_when_time_is_up(
    plain: scoped_session[Session], caplog: pytest.LogCaptureFixture
) -> None:
    """``give_up_after`` bounds the time that a client waits for the last attempt to begin."""
    caplog.set_level(logging.INFO)
    work = Restless()
    with pytest.raises(Retry):
        drive(protect(list_app(work), plain, give_up_after=0))
    assert work.attempts == 1

    work = Restless()
    with pytest.raises(Retry):
        drive(
            protect(
                list_app(work),
                plain,
                attempts=10**6,
                backoff=1000,
                max_backoff=1000,
                give_up_after=0.05,
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
    run_transaction(work, Session, attempts=100, backoff=0.02, max_backoff=0.02)

pausing = gevent.spawn(run)
gevent.spawn(other.append, None)
pausing.get(timeout=10)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
