"""What a transaction sets for itself ends with it, and no other one sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import bindparam, event, func, select, text
from sqlalchemy.exc import DBAPIError

from tests.support.models import Author, Note, make_engine
from tests.support.postgres import DRIVERS
from tests.support.wsgi import make_registry
from tests.testing.applications import add, make_app, notes, problem, request
from wsgi_dbsession import current_scope, session_scope
from wsgi_dbsession.testing import isolate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TypeAlias

    from sqlalchemy import Connection

    from tests.support.models import Database
    from tests.testing.applications import Registry

    Work: TypeAlias = Callable[[Registry], object]


@pytest.fixture(params=DRIVERS)
def registry(request: pytest.FixtureRequest, postgres_database: Database) -> Iterator[Registry]:
    """A registry on PostgreSQL, with each of the drivers."""
    engine = make_engine(postgres_database.url.set(drivername=f"postgresql+{request.param}"))
    yield make_registry(engine)
    engine.dispose()


def tenant(registry: Registry) -> str | None:
    """Return what row-level security would go by."""
    found: str | None = registry.scalar(text("SELECT current_setting('app.tenant', true)"))
    return found


def set_tenant(registry: Registry, value: str = "7") -> None:
    registry.execute(text(f"SET LOCAL app.tenant = '{value}'"))


def _as_a_parameter(registry: Registry) -> None:
    registry.execute(select(func.set_config("app.tenant", "7", True)))


def _as_text_with_parameters(registry: Registry) -> None:
    statement = text("SELECT set_config(:name, :value, true)").bindparams(
        bindparam("value", "7"), bindparam("name", "App.Tenant")
    )
    registry.execute(statement)


def _in_a_block(registry: Registry) -> None:
    registry.execute(text("DO $$ BEGIN SET LOCAL app.tenant = 7; END $$"))


def _in_a_function(registry: Registry) -> None:
    registry.execute(text("SELECT be_tenant(7)"))


FUNCTION = """
    CREATE OR REPLACE FUNCTION be_tenant(n integer) RETURNS void LANGUAGE plpgsql AS
    $$ BEGIN PERFORM set_config('app.tenant', n::text, true); END $$
"""


@pytest.fixture
def function(postgres_database: Database) -> Iterator[None]:
    """A function of the database that sets the tenant."""
    with postgres_database.observer.begin() as connection:
        connection.execute(text(FUNCTION))
    yield
    with postgres_database.observer.begin() as connection:
        connection.execute(text("DROP FUNCTION be_tenant"))


@pytest.mark.usefixtures("function")
@pytest.mark.parametrize(
    "set_it",
    [
        pytest.param(set_tenant, id="SET LOCAL"),
        pytest.param(_as_a_parameter, id="set_config()"),
        pytest.param(_as_text_with_parameters, id="set_config() with a name as parameter"),
        pytest.param(_in_a_block, id="in a DO block"),
        pytest.param(_in_a_function, id="in a function"),
    ],
)
@pytest.mark.parametrize("outcome", ["commit", "rollback"])
def test_a_local_setting_ends_with_its_transaction(
    registry: Registry, set_it: Work, outcome: str
) -> None:
    """The next request has none, however this one set it and ended."""

    def work() -> None:
        set_it(registry)
        assert tenant(registry) == "7"
        registry.add(Note(text="a"))
        if outcome == "rollback":
            current_scope().doom()

    with isolate(registry) as outcomes:
        for _ in range(2):
            assert request(make_app(work, registry)) == 200
            with session_scope(registry):
                assert not tenant(registry)
        assert [each.outcome for each in outcomes[::2]] == [outcome] * 2


def test_no_other_transaction_sees_it(registry: Registry) -> None:
    """An inner block has settings of its own, and the request has its own again after it."""
    with isolate(registry):
        with session_scope(registry):
            set_tenant(registry, "outer")
            for outcome in ("commit", "rollback"):
                with session_scope(registry) as scope:
                    assert not tenant(registry)
                    set_tenant(registry, "inner")
                    registry.add(Note(text=outcome))
                    if outcome == "rollback":
                        scope.doom()
                assert tenant(registry) == "outer"
        with session_scope(registry):
            assert not tenant(registry)
        assert notes(registry) == ["commit"]


def test_two_sessions_in_turns_have_their_own(registry: Registry) -> None:
    """At each statement, and in their savepoints."""
    with isolate(registry):
        one, two = registry.session_factory(), registry.session_factory()
        get = text("SELECT current_setting('app.tenant', true)")
        for session, value in ((one, "one"), (two, "two")):
            session.execute(text(f"SET LOCAL app.tenant = '{value}'"))
        savepoint = one.begin_nested()
        one.execute(text("SET LOCAL app.tenant = 'nested'"))
        assert (two.scalar(get), one.scalar(get)) == ("two", "nested")
        two.scalar(get)
        savepoint.rollback()
        assert (one.scalar(get), two.scalar(get)) == ("one", "two")
        one.commit()
        assert two.scalar(get) == "two"
        assert not one.scalar(get)
        two.close()
        one.close()


def test_a_savepoint_takes_its_settings_along(registry: Registry) -> None:
    """If it is rolled back, and not if it is released."""
    with isolate(registry), session_scope(registry):
        set_tenant(registry, "before")
        with registry.begin_nested():
            set_tenant(registry, "released")
        savepoint = registry.begin_nested()
        set_tenant(registry, "given up")
        add(registry, "audit")
        savepoint.rollback()
        assert tenant(registry) == "released"


def test_a_transaction_that_only_set_something_undoes_nothing(registry: Registry) -> None:
    """To set the tenant is what each request begins with, and no write."""
    with isolate(registry):
        with session_scope(registry) as scope:
            set_tenant(registry)
            add(registry, "audit")
            scope.doom()
        assert notes(registry) == ["audit"]


def test_begin_listeners_may_set_it(postgres_database: Database) -> None:
    """For each transaction, the usual way."""
    engine = postgres_database.engine
    registry = make_registry(engine)
    tenants = iter("abc")

    @event.listens_for(engine, "begin")
    def _(connection: Connection) -> None:
        connection.execute(text(f"SET LOCAL app.tenant = '{next(tenants)}'"))

    with isolate(registry), session_scope(registry):
        assert tenant(registry) == "a"
        with session_scope(registry):
            assert tenant(registry) == "b"
        assert tenant(registry) == "a"


@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("SET LOCAL search_path = pg_catalog", "search_path"),
        ("SET LOCAL SCHEMA 'pg_catalog'", "search_path"),
        ("SET LOCAL TIME ZONE 'Europe/Berlin'", "TimeZone"),
        ("SET LOCAL statement_timeout = '90s'", "statement_timeout"),
        ("SET LOCAL \"statement_timeout\" = '90s'", "statement_timeout"),
        ("SET LOCAL ROLE pg_read_all_data", "role"),
        ("SET LOCAL SESSION AUTHORIZATION pg_read_all_data", "session_authorization"),
    ],
)
def test_settings_of_postgresql_itself_end_too(
    postgres_database: Database, statement: str, name: str
) -> None:
    """Also with a role that could not set back another setting."""
    registry = make_registry(postgres_database.engine)
    get = text(f"SELECT current_setting('{name}')")
    with isolate(registry):
        with session_scope(registry):
            before = registry.scalar(get)
        with session_scope(registry):
            registry.execute(text("SET LOCAL session_replication_role = replica"))
            registry.execute(text(statement))
            inside = registry.scalar(get)
            assert inside != before
            with session_scope(registry):
                assert registry.scalar(get) == before
                assert registry.scalar(text("SHOW session_replication_role")) == "origin"
            assert registry.scalar(get) == inside
            assert registry.scalar(text("SHOW session_replication_role")) == "replica"
        with session_scope(registry):
            assert registry.scalar(get) == before
            registry.add(Note(text="a"))


def test_a_read_only_transaction_is_followed_by_others(registry: Registry) -> None:
    """PostgreSQL itself ends that with the savepoint."""
    with isolate(registry):
        with pytest.raises(DBAPIError, match="read-only"), session_scope(registry):
            registry.execute(text("SET LOCAL transaction_read_only = on"))
            registry.execute(text("INSERT INTO note (text) VALUES ('refused')"))
        add(registry, "a")


@pytest.mark.parametrize(
    "statement",
    [
        text("SET app.tenant = '7'"),
        text("SELECT set_config('app.tenant', '7', false)"),
        select(func.set_config("app.tenant", "7", False)),
    ],
    ids=["SET", "set_config() as text", "set_config()"],
)
def test_a_setting_of_the_connection_stays_until_the_end(
    postgres_database: Database, statement: object
) -> None:
    """As it does in production, where the pool gives out the connection again."""
    registry = make_registry(postgres_database.engine)
    with isolate(registry):
        with session_scope(registry):
            registry.execute(statement)  # type: ignore[call-overload]
        with session_scope(registry):
            assert tenant(registry) == "7"
    with session_scope(registry):
        assert not tenant(registry)


def _setting(name: str) -> Any:
    return text(f"SELECT coalesce(current_setting('{name}', true), '')")


@pytest.mark.parametrize("whole", [True, False], ids=["a transaction", "a savepoint"])
@pytest.mark.parametrize("others", [True, False], ids=["others commit", "alone"])
@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("SET app.tenant = '7'", "app.tenant"),
        ("SET SESSION app.tenant TO '7'", "app.tenant"),
        ("/* x */ SET TIME ZONE 'Europe/Berlin'", "TimeZone"),
        ("SET statement_timeout = 5; SET application_name = 'x'", "application_name"),
        ("RESET application_name", "application_name"),
        ("SET ROLE pg_write_all_data", "role"),
        ("SET SESSION AUTHORIZATION pg_write_all_data", "session_authorization"),
    ],
)
def test_a_rollback_takes_back_a_setting_of_the_connection(
    postgres_database: Database, statement: str, name: str, whole: bool, others: bool
) -> None:
    """And only that: what another transaction has committed meanwhile stays."""
    registry = make_registry(postgres_database.engine)
    with isolate(registry):
        with session_scope(registry):
            registry.execute(text("SET application_name = 'before'"))
            before = registry.scalar(_setting(name))
        with session_scope(registry) as scope:
            savepoint = None if whole else registry.begin_nested()
            if others:
                add(registry, "audit")
            registry.execute(text("SET LOCAL statement_timeout = '9s'"))
            registry.execute(text(statement))
            assert registry.scalar(_setting(name)) != before
            if others:
                with session_scope(registry):
                    registry.execute(text("INSERT INTO note (text) VALUES ('audit')"))
            if savepoint is not None:
                savepoint.rollback()
                assert registry.scalar(_setting(name)) == before
            scope.doom()
        with session_scope(registry):
            assert registry.scalar(_setting(name)) == before
        assert notes(registry) == (["audit", "audit"] if others else [])


def test_a_released_savepoint_leaves_its_setting_to_the_transaction(registry: Registry) -> None:
    """So the rollback of the transaction takes it back."""
    with isolate(registry):
        for outcome in ("rollback", "commit"):
            with session_scope(registry) as scope:
                with registry.begin_nested():
                    registry.execute(text("SET app.tenant = '7'"))
                add(registry, "audit")
                if outcome == "rollback":
                    scope.doom()
            with session_scope(registry):
                assert tenant(registry) == ("7" if outcome == "commit" else "")


@pytest.mark.parametrize("statement", ["SET CONSTRAINTS ALL DEFERRED", "RESET ALL"])
def test_what_cannot_be_taken_back_alone_is_a_write(registry: Registry, statement: str) -> None:
    """Its rollback undoes what was committed meanwhile, and is reported."""
    with problem("has undone what"), isolate(registry), session_scope(registry) as scope:
        registry.execute(text(statement))
        add(registry, "audit")
        scope.doom()


def test_a_failed_transaction_loses_its_settings(registry: Registry) -> None:
    """PostgreSQL has aborted it, and answers no question about them."""
    with problem("has undone what"), isolate(registry), session_scope(registry):
        set_tenant(registry, "outer")
        registry.add(Note(text="a"))
        savepoint = registry.begin_nested()
        with pytest.raises(DBAPIError, match="division by zero"):
            registry.execute(text("SELECT 1 / 0"))
        add(registry, "audit")
        savepoint.rollback()
        assert tenant(registry) == "outer"
        set_tenant(registry, "later")
        with pytest.raises(DBAPIError, match="division by zero"):
            registry.execute(text("SELECT 1 / 0"))
        registry.rollback()
        assert not tenant(registry)


def test_a_setting_that_cannot_be_made_again_leaves_no_transaction(
    postgres_database: Database,
) -> None:
    """The begin fails, and the application may try anew."""
    engine = postgres_database.engine
    registry = make_registry(engine)
    role = f"role_of_{postgres_database.url.database}"
    with engine.begin() as connection:
        connection.execute(text(f"CREATE ROLE {role}"))
        connection.execute(text(f"SET ROLE {role}"))
    with isolate(registry):
        with session_scope(registry):
            registry.execute(text("SET LOCAL ROLE none"))
            registry.execute(text(f"DROP ROLE {role}"))
        for _ in range(2):
            with pytest.raises(DBAPIError, match="does not exist"):
                notes(registry)
    with engine.begin() as connection:
        connection.execute(text("SET ROLE none"))
        connection.execute(text(f"DROP ROLE {role}"))


@pytest.fixture
def secured(postgres_database: Database) -> Iterator[str]:
    """A role that reads and writes only the notes of its tenant."""
    role = f"tenant_of_{postgres_database.url.database}"
    with postgres_database.observer.begin() as connection:
        for statement in (
            f"CREATE ROLE {role}",
            f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}",
            f"GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {role}",
            "ALTER TABLE note ENABLE ROW LEVEL SECURITY",
            "CREATE POLICY own ON note USING (text = current_setting('app.tenant', true))",
        ):
            connection.execute(text(statement))
    yield role
    with postgres_database.observer.begin() as connection:
        for statement in (
            "DROP POLICY own ON note",
            "ALTER TABLE note DISABLE ROW LEVEL SECURITY",
            f"DROP OWNED BY {role}",
            f"DROP ROLE {role}",
        ):
            connection.execute(text(statement))


def test_row_level_security_works(postgres_database: Database, secured: str) -> None:
    """Each transaction has the role and the tenant that a listener gives it, and no other."""
    registry = make_registry(postgres_database.engine)

    @event.listens_for(registry, "after_begin")
    def secure(session: object, transaction: object, connection: Connection) -> None:
        name = current_scope().info.get("tenant", "")
        if name:
            connection.execute(text(f"SET LOCAL ROLE {secured}"))
            connection.execute(select(func.set_config("app.tenant", name, True)))

    def visible() -> list[str]:
        return list(registry.scalars(select(Note.text)))

    with isolate(registry):
        with session_scope(registry) as one:
            one.info["tenant"] = "one"
            registry.add(Note(text="one"))
            with pytest.raises(DBAPIError, match="row-level security"), registry.begin_nested():
                registry.add(Note(text="two"))
            with session_scope(registry) as two:
                two.info["tenant"] = "two"
                registry.add(Note(text="two"))
                registry.add(Author(id=1))
                assert visible() == ["two"]
            assert visible() == ["one"]
        assert notes(registry) == ["one", "two"]
        with session_scope(registry) as two:
            two.info["tenant"] = "two"
            assert visible() == ["two"]
            two.doom()
        assert notes(registry) == ["one", "two"]
