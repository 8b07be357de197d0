"""Random programs do the same in an isolation as on real commits."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, select, text

from tests.support.models import Author, Book, Note
from tests.support.wsgi import make_registry
from wsgi_dbsession import session_scope
from wsgi_dbsession.testing import isolate

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TypeAlias

    from tests.support.models import Database
    from tests.testing.applications import Registry

    Step: TypeAlias = tuple[Any, ...]

SIMPLE = st.sampled_from(
    ["add", "call", "cursor", "read", "tenant", "owe", "pay", "fail", "commit", "rollback"]
)
STEPS = st.recursive(
    SIMPLE.map(lambda name: (name,)),
    lambda steps: st.tuples(
        st.sampled_from(["savepoint", "scope"]),
        st.lists(steps, max_size=5),
        st.sampled_from(["commit", "rollback"]),
    ),
    max_leaves=12,
)


@dataclass
class Run:
    """What one run of a program has seen."""

    registry: Registry
    seen: list[object] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def steps(self, steps: list[Step], owed: list[int]) -> None:
        for step in steps:
            getattr(self, f"do_{step[0]}")(owed, *step[1:])

    def do_add(self, owed: list[int]) -> None:
        self.registry.add(Note(text=str(next(self.numbers))))
        self.registry.flush()

    def do_call(self, owed: list[int]) -> None:
        self.registry.execute(text(f"SELECT write('{next(self.numbers)}')"))

    def do_cursor(self, owed: list[int]) -> None:
        cursor = self.registry.connection().connection.cursor()
        cursor.execute(f"INSERT INTO note (text) VALUES ('{next(self.numbers)}')")
        cursor.close()

    def do_read(self, owed: list[int]) -> None:
        self.registry.scalars(select(Note)).all()
        tenant = self.registry.scalar(text("SELECT current_setting('app.tenant', true)"))
        self.seen.append(tenant or "")

    def do_tenant(self, owed: list[int]) -> None:
        self.registry.execute(text(f"SET LOCAL app.tenant = '{next(self.numbers)}'"))

    def do_owe(self, owed: list[int]) -> None:
        number = next(self.numbers)
        self.registry.add(Book(author_id=number))
        self.registry.flush()
        owed.append(number)

    def do_pay(self, owed: list[int]) -> None:
        for number in owed:
            if self.registry.get(Author, number) is None:
                self.registry.add(Author(id=number))
        self.registry.flush()

    def do_fail(self, owed: list[int]) -> None:
        with pytest.raises(Exception, match="division by zero"), self.registry.begin_nested():
            self.registry.execute(text("SELECT 1 / 0"))

    def do_commit(self, owed: list[int]) -> None:
        self.registry.commit()

    def do_rollback(self, owed: list[int]) -> None:
        self.registry.rollback()

    def do_savepoint(self, owed: list[int], steps: list[Step], end: str) -> None:
        savepoint = self.registry.begin_nested()
        self.steps(steps, owed)
        if savepoint.is_active:  # it was not ended with its transaction
            getattr(savepoint, end)()

    def do_scope(self, owed: list[int], steps: list[Step], end: str) -> None:
        try:
            with session_scope(self.registry) as scope:
                self.steps(steps, [])
                if end == "rollback":
                    scope.doom()
        except Exception as error:
            self.seen.append(type(error).__name__)

    def rows(self) -> tuple[set[str], set[int], set[int]]:
        with session_scope(self.registry):
            return (
                {*self.registry.scalars(select(Note.text))},
                {*self.registry.scalars(select(Author.id))},
                {*self.registry.scalars(select(Book.author_id))},
            )


@pytest.fixture
def function(postgres_database: Database) -> Iterator[None]:
    """A function of the database that writes."""
    with postgres_database.observer.begin() as connection:
        connection.execute(
            text(
                "CREATE FUNCTION write(text) RETURNS void LANGUAGE sql "
                "AS 'INSERT INTO note (text) VALUES ($1)'"
            )
        )
    yield
    with postgres_database.observer.begin() as connection:
        connection.execute(text("DROP FUNCTION write"))


@pytest.mark.usefixtures("function")
@settings(
    max_examples=60,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(STEPS, max_size=6))
@example([("owe",), ("fail",), ("scope", [("add",)], "commit")])
@example([("owe",), ("savepoint", [("scope", [("add",)], "commit")], "commit"), ("pay",)])
@example([("tenant",), ("savepoint", [("tenant",)], "rollback"), ("read",)])
def test_a_program_does_the_same_in_an_isolation(
    postgres_database: Database, steps: list[Step]
) -> None:
    """It sees the same, fails the same and leaves the same; or the isolation reports why not."""
    registry = make_registry(postgres_database.engine)
    program = [("scope", steps, "commit")]
    isolated, real = Run(registry), Run(registry)
    reported = False
    try:
        with isolate(registry):
            isolated.steps(program, [])
            rows = isolated.rows()
    except RuntimeError as error:
        reported = "has undone what" in str(error)
    assert Run(registry).rows() == (set(), set(), set())
    if not reported:
        try:
            real.steps(program, [])
            assert (isolated.seen, rows) == (real.seen, real.rows())
        finally:
            with postgres_database.observer.begin() as connection:
                for table in (Book, Author, Note):
                    connection.execute(delete(table))
