"""A ``released()`` block is no commit, so a race that is lost after it is run again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy import select, text

from tests.retry.applications import Race, list_app, protect
from tests.support.models import Note
from tests.support.wsgi import drive
from wsgi_dbsession import current_scope
from wsgi_dbsession.retry import run_transaction

if TYPE_CHECKING:
    from sqlalchemy.orm import Session, scoped_session

    from tests.support.models import Database
    from tests.support.postgres import Server

pytestmark = pytest.mark.promise("released")


def test_the_slow_call_is_repeated(race: Race, postgres_database: Database) -> None:
    """An attempt is the whole request: what it did outside of the database is done twice."""
    calls: list[list[str]] = []

    def work() -> None:
        texts = list(race.registry.scalars(select(Note.text)))
        with current_scope().released():
            calls.append(texts)
        race.run()

    reply = drive(protect(list_app(work), race.registry), "POST")

    assert (reply.status, race.attempts) == ("200 OK", 2)
    assert len(calls) == 2
    assert sorted(postgres_database.notes()) == race.done()


def test_a_race_before_the_block_is_run_again(
    serializable: scoped_session[Session], postgres_database: Database
) -> None:
    """The block is refused in a transaction that has failed, and nothing hides the error."""
    attempts: list[str] = []

    def work() -> None:
        attempts.append("begin")
        if len(attempts) == 1:
            serializable.execute(
                text("DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '40001'; END $$")
            )
        with current_scope().released():
            attempts.append("slow")
        serializable.add(Note(text="second"))

    assert drive(protect(list_app(work), serializable), "POST").status == "200 OK"

    assert attempts == ["begin", "begin", "slow"]
    assert postgres_database.notes() == ["first", "second"]


def test_a_commit_before_the_block_is_one(
    serializable: scoped_session[Session], postgres_server: Server, postgres_database: Database
) -> None:
    """What the application committed itself is never repeated."""
    race = Race(serializable, postgres_server)
    errors: list[BaseException] = []

    def work() -> None:
        serializable.add(Note(text="committed"))
        serializable.commit()
        with current_scope().released():
            pass
        race.run()

    try:
        drive(protect(list_app(work), serializable), "POST")
    except Exception as error:
        errors.append(error)

    assert (race.attempts, len(errors)) == (1, 1)
    assert postgres_database.notes() == ["committed", "first!"]


def test_run_transaction_repeats_it_too(race: Race, postgres_database: Database) -> None:
    """A job is an attempt as a request is."""

    def work() -> None:
        race.registry.scalars(select(Note.text)).all()
        with current_scope().released():
            pass
        race.run()

    run_transaction(work, race.registry, backoff=0)

    assert race.attempts == 2
    assert sorted(postgres_database.notes()) == race.done()
