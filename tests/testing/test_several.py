"""Isolation of several registries and engines."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Connection, Engine, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session as SQLAlchemySession
from sqlalchemy.orm import scoped_session

from tests.support.models import Author, Book, Database, Note
from tests.support.wsgi import make_registry
from tests.testing.applications import Registry, add, make_app, notes, request
from wsgi_dbsession import current_scope, session_scope
from wsgi_dbsession.testing import isolate

pytestmark = pytest.mark.promise("nothing remains")


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
        failed = make_app(int, registries[0], status="503 Service Unavailable")
        request(make_app(work, *registries, commit_error=failed))
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
    with session_scope(registry):  # which adopts it, and gives it a class that can be
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
