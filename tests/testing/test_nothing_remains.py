"""Isolation leaves no row, whichever client asks."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import falcon.testing
import flask
import pytest
from sqlalchemy import insert, select, text
from webtest import TestApp
from werkzeug.test import Client

from tests.support.models import Database, Note
from tests.testing.applications import Registry, add, make_app, notes, request, use_savepoints
from wsgi_dbsession import current_scope, session_scope
from wsgi_dbsession.testing import isolate

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed.wsgi import WSGIApplication

pytestmark = pytest.mark.promise("nothing remains")


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


@pytest.mark.parametrize(
    ("work", "seen"),
    [
        pytest.param(lambda r: r.add(Note(text="a")), ["a"], id="the middleware commits"),
        pytest.param(_commit_by_hand, ["by hand", "and once more"], id="the application commits"),
        pytest.param(_roll_back_in_between, ["second try"], id="the application rolls back"),
        pytest.param(use_savepoints, ["released", "left open"], id="savepoints"),
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


def test_isolation_needs_no_pytest() -> None:
    """Whoever uses another test runner need not install it."""
    script = "import sys, wsgi_dbsession.testing; sys.exit('pytest' in sys.modules)"
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", script]) == 0
