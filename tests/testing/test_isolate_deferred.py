"""A commit checks the deferred constraints of its own transaction, and of no other one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy import delete, func, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError

from tests.support.models import Author, Book, Note, make_engine
from tests.support.wsgi import make_registry
from tests.testing.applications import add, make_app, notes, problem, request
from wsgi_dbsession import session_scope
from wsgi_dbsession.testing import isolate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.models import Database
    from tests.testing.applications import Registry


@pytest.fixture
def registry(driver_database: Database) -> Registry:
    """A registry that uses each of the drivers."""
    return make_registry(driver_database.engine)


def add_book(registry: Registry, author_id: int) -> None:
    """Violate the foreign key, unless there is such an author."""
    registry.add(Book(author_id=author_id))
    registry.flush()


def count(registry: Registry) -> tuple[int | None, int | None]:
    with session_scope(registry):
        return (
            registry.scalar(select(func.count(Book.id))),
            registry.scalar(select(func.count(Author.id))),
        )


def test_a_pending_violation_of_the_request_fails_no_inner_block(registry: Registry) -> None:
    """In production they are two transactions, and the request fulfils the key before its end."""

    def work() -> None:
        add_book(registry, 7)
        add(registry, "audit")
        registry.add(Author(id=7))

    with isolate(registry) as outcomes:
        assert request(make_app(work, registry)) == 200
        assert [each.outcome for each in outcomes] == ["commit", "commit"]
        assert (notes(registry), count(registry)) == (["audit"], (1, 1))


def test_a_violation_of_the_request_fails_the_request(registry: Registry) -> None:
    """It is not forgotten when an inner block has been committed."""

    def work() -> None:
        add_book(registry, 7)
        add(registry, "audit")

    failed = make_app(int, registry, status="503 Service Unavailable")
    with problem("has undone what"), isolate(registry) as outcomes:
        assert request(make_app(work, registry, commit_error=failed)) == 503
        assert [each.outcome for each in outcomes[:2]] == ["rollback", "commit"]


@pytest.mark.parametrize("author", [7, 8], ids=["the same row", "another row"])
def test_a_violation_of_the_inner_block_fails_it(registry: Registry, author: int) -> None:
    """Though the request has violated the same constraint before it."""

    def work() -> None:
        add_book(registry, 7)
        with pytest.raises(DBAPIError), session_scope(registry):
            add_book(registry, author)
        registry.add(Author(id=7))

    with isolate(registry) as outcomes:
        assert request(make_app(work, registry)) == 200
        assert [each.outcome for each in outcomes] == ["commit", "rollback"]
        assert count(registry) == (1, 1)


def test_a_violation_by_deletion_is_found(registry: Registry) -> None:
    """An inner block takes away what another transaction refers to."""
    with isolate(registry):
        with session_scope(registry):
            registry.add_all([Author(id=1), Book(author_id=1)])
        with session_scope(registry):
            add_book(registry, 7)
            with pytest.raises(DBAPIError), session_scope(registry):
                registry.execute(delete(Author))
            registry.add(Author(id=7))
        assert count(registry) == (2, 2)


def test_each_of_two_sessions_answers_for_its_own(registry: Registry) -> None:
    """Whatever the order in which they write and end."""
    with problem("has undone what"), isolate(registry):
        one, two = registry.session_factory(), registry.session_factory()
        one.add(Note(text="one"))
        one.flush()
        two.add(Book(author_id=2))
        two.flush()
        one.add(Book(author_id=1))
        one.flush()
        two.add(Author(id=2))
        two.commit()
        two.add(Note(text="two"))
        with pytest.raises(DBAPIError):
            one.commit()
        one.rollback()
        one.close()
        two.close()


def test_the_violation_of_a_prepared_transaction_is_found(registry: Registry) -> None:
    """Two-phase transactions are checked when they are prepared."""
    two_phase = make_registry(registry.session_factory.kw["bind"], twophase=True)
    with isolate(registry, two_phase), session_scope(registry):
        add_book(registry, 7)
        add(two_phase, "a")
        # The oldest SQLAlchemy raises an error of its own when a prepare() fails.
        with pytest.raises(SQLAlchemyError), session_scope(two_phase):
            add_book(two_phase, 8)
        registry.add(Author(id=7))


@pytest.mark.parametrize("names", ['"per cent %s" text', "n integer, m integer"])
def test_other_kinds_of_constraints_are_checked(postgres_database: Database, names: str) -> None:
    """Unique ones, keys of several columns, of columns with odd names, and triggers."""
    registry = make_registry(postgres_database.engine)
    columns = ", ".join(each.rsplit(" ", 1)[0] for each in names.split(", "))
    values = ", ".join("1" for _ in names.split(", "))
    with isolate(registry), session_scope(registry):
        for statement in (
            f"CREATE TABLE parent ({names}, UNIQUE ({columns}))",
            (
                f"CREATE TABLE child ({names}, FOREIGN KEY ({columns}) "
                f"REFERENCES parent ({columns}) DEFERRABLE INITIALLY DEFERRED)"
            ),
            "CREATE TABLE page (n integer UNIQUE DEFERRABLE INITIALLY DEFERRED)",
            (
                "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
                "$$ BEGIN RAISE 'refused'; END $$"
            ),
            "CREATE TABLE refused (n integer)",
            (
                "CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON refused DEFERRABLE "
                "INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse()"
            ),
        ):
            registry.connection().exec_driver_sql(
                statement, execution_options={"no_parameters": True}
            )
        registry.commit()
        page, child = "INSERT INTO page VALUES (1)", f"INSERT INTO child VALUES ({values})"
        registry.execute(text(page))
        registry.execute(text(page))
        registry.execute(text(child))
        add(registry, "audit")
        for statement in (
            child,
            "INSERT INTO page VALUES (2), (2)",
            "INSERT INTO refused VALUES (1)",
        ):
            with pytest.raises(DBAPIError), session_scope(registry):
                registry.execute(text(statement))
        registry.execute(text("DELETE FROM child"))
        registry.execute(text("DELETE FROM page"))


@pytest.mark.parametrize(
    "statement", ["SET LOCAL ROLE pg_monitor", "SET LOCAL SESSION AUTHORIZATION pg_monitor"]
)
def test_rows_that_the_role_must_not_read_are_found(
    postgres_database: Database, statement: str
) -> None:
    """The transaction may have given up its rights."""
    registry = make_registry(postgres_database.engine)
    with isolate(registry):
        with session_scope(registry):
            add_book(registry, 7)
            registry.execute(text(statement))
            add(registry, "audit")
            with pytest.raises(DBAPIError), session_scope(registry):
                add_book(registry, 8)
            registry.execute(text("SET LOCAL SESSION AUTHORIZATION DEFAULT"))
            registry.execute(text("SET LOCAL ROLE NONE"))
            registry.add(Author(id=7))
        assert (notes(registry), count(registry)) == (["audit"], (1, 1))


@pytest.fixture
def writer(postgres_database: Database) -> Iterator[str]:
    """A user of the database who must not read it."""
    name = f"writer_of_{postgres_database.url.database}"
    with postgres_database.observer.begin() as connection:
        connection.execute(text(f"CREATE ROLE {name} LOGIN"))
        connection.execute(text(f"GRANT INSERT ON note, author, book TO {name}"))
        connection.execute(text(f"GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {name}"))
    yield name
    with postgres_database.observer.begin() as connection:
        connection.execute(text(f"DROP OWNED BY {name}"))
        connection.execute(text(f"DROP ROLE {name}"))


def test_a_user_who_must_not_read_goes_by_the_error(
    postgres_database: Database, writer: str
) -> None:
    """It names the first row, which is the same one as before."""
    engine = make_engine(postgres_database.url.set(username=writer))
    registry = make_registry(engine)
    with isolate(registry) as outcomes:
        with session_scope(registry):
            registry.execute(insert(Book).values(author_id=7).inline())
            with session_scope(registry):
                registry.execute(insert(Note).values(text="audit").inline())
            registry.execute(insert(Author).values(id=7).inline())
        assert [each.outcome for each in outcomes] == ["commit", "commit"]
    engine.dispose()


def test_a_key_that_was_deferred_by_hand_stays_deferred(postgres_database: Database) -> None:
    """An inner block's commit leaves the constraints of the request alone."""
    registry = make_registry(postgres_database.engine)
    with isolate(registry):
        with session_scope(registry):
            registry.execute(
                text("CREATE TABLE page (book integer REFERENCES book DEFERRABLE, n integer)")
            )
        with session_scope(registry):
            registry.execute(text("SET CONSTRAINTS ALL DEFERRED"))
            add_book(registry, 7)
            add(registry, "audit")
            registry.execute(text("INSERT INTO page VALUES (1000, 1)"))
            registry.add_all([Author(id=7), Book(id=1000, author_id=7)])


def test_sqlites_keys_may_all_be_deferred(sqlite_database: Database) -> None:
    """By a PRAGMA, which ends with the transaction: the next one has to check again."""
    registry = make_registry(sqlite_database.engine)
    with isolate(registry):
        with session_scope(registry):
            registry.execute(text("CREATE TABLE page (book integer REFERENCES book (id))"))
        with pytest.raises(IntegrityError), session_scope(registry):
            registry.execute(text("PRAGMA defer_foreign_keys = ON"))
            registry.execute(text("INSERT INTO page VALUES (7)"))
        with session_scope(registry):
            registry.execute(text("PRAGMA defer_foreign_keys = ON"))
            registry.execute(text("INSERT INTO page VALUES (7)"))
            with session_scope(registry), pytest.raises(IntegrityError, match="FOREIGN KEY"):
                registry.execute(text("INSERT INTO page VALUES (8)"))
            registry.execute(text("INSERT INTO page VALUES (9)"))
            registry.execute(text("DELETE FROM page"))
        with session_scope(registry), pytest.raises(IntegrityError, match="FOREIGN KEY"):
            registry.execute(text("INSERT INTO page VALUES (7)"))
