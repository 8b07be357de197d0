"""Isolations, requests and blocks in one another."""

from __future__ import annotations

import contextlib

import pytest
from sqlalchemy import select

from tests.support.models import Database, Note
from tests.support.wsgi import make_registry
from tests.testing.applications import Registry, add, make_app, notes, problem, request
from wsgi_dbsession import session_scope
from wsgi_dbsession.testing import isolate

pytestmark = pytest.mark.promise("nothing remains")

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
