"""Connections that the database or a firewall has dropped: what SQLAlchemy's settings promise."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, text

from tests.support.models import Database, Note, make_engine
from tests.support.wsgi import BODIES, Program, ask, assert_nothing_left, make_registry
from wsgi_dbsession import SessionMiddleware, session_scope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Engine
    from sqlalchemy.orm import Session, scoped_session

    from tests.support.postgres import Admin

    Registry = scoped_session[Session]
    MakeRegistry = Callable[..., Registry]

pytestmark = pytest.mark.promise("dropped connections")


@pytest.fixture
def make(postgres_database: Database) -> Iterator[MakeRegistry]:
    """Make registries with settings for the pool."""
    engines: list[Engine] = []

    def make(**options: Any) -> Registry:
        engines.append(make_engine(postgres_database.url, **options))
        return make_registry(engines[-1])

    yield make
    for engine in engines:
        engine.dispose()


def post(registry: Registry, **work: Callable[[], object]) -> str:
    """Send a request that writes a row, and return the status."""

    def early() -> None:
        registry.add(Note(text="a"))
        registry.flush()

    program = Program(early, **work)  # type: ignore[arg-type]
    reply = ask(SessionMiddleware(BODIES["list body"](program), registry), "POST", "/notes")
    assert_nothing_left(registry)
    return reply.status[:3]


def fill_pool(registry: Registry, count: int) -> None:
    """Have the pool keep that many idle connections."""
    engine = registry.session_factory.kw["bind"]
    connections = [engine.connect() for _ in range(count)]
    for connection in connections:
        connection.close()


def test_without_a_setting_one_request_fails(
    make: MakeRegistry, postgres_database: Database, postgres_admin: Admin
) -> None:
    """Exactly one, though several connections were dropped: SQLAlchemy gives all of them up."""
    registry = make()
    fill_pool(registry, 3)
    assert post(registry) == "200"

    assert postgres_admin.terminate() == 3

    assert [post(registry) for _ in range(4)] == ["500", "200", "200", "200"]
    assert len(postgres_database.notes()) == 4


def test_with_pool_pre_ping_no_request_fails(
    make: MakeRegistry, postgres_database: Database, postgres_admin: Admin
) -> None:
    """Each connection is tried before it is used."""
    registry = make(pool_pre_ping=True)
    fill_pool(registry, 3)

    for _ in range(2):
        postgres_admin.terminate()
        assert [post(registry) for _ in range(2)] == ["200", "200"]

    assert len(postgres_database.notes()) == 4


@pytest.mark.parametrize(("age", "status"), [(3601, "200"), (0, "500")], ids=["older", "younger"])
def test_pool_recycle_is_for_connections_of_an_age(
    make: MakeRegistry, postgres_admin: Admin, age: int, status: str
) -> None:
    """An older one is not used again; a younger one may have been dropped all the same."""
    registry = make(pool_recycle=3600)

    def grow_old(connection: object, record: Any) -> None:
        record.starttime -= age

    event.listen(registry.session_factory.kw["bind"], "checkin", grow_old)
    assert post(registry) == "200"

    postgres_admin.terminate()

    assert post(registry) == status
    assert post(registry) == "200"


@pytest.mark.parametrize("options", [{}, {"pool_pre_ping": True}], ids=["", "pool_pre_ping"])
def test_a_connection_dropped_in_a_request_costs_that_request(
    make: MakeRegistry,
    postgres_database: Database,
    postgres_admin: Admin,
    caplog: pytest.LogCaptureFixture,
    options: dict[str, Any],
) -> None:
    """No setting helps where a transaction is open; the rollback of it makes no noise."""
    registry = make(**options)

    def drop() -> None:
        postgres_admin.terminate()
        registry.execute(text("SELECT 1"))

    assert post(registry, late=drop) == "500"
    assert caplog.records == []
    assert post(registry) == "200"
    assert postgres_database.notes() == ["a"]


def test_a_connection_dropped_during_the_commit_is_not_called_a_rollback(
    make: MakeRegistry, postgres_admin: Admin, caplog: pytest.LogCaptureFixture
) -> None:
    """The client gets a 500, and the log says that the outcome is unknown."""
    registry = make()
    event.listen(registry.session_factory, "before_commit", lambda _: postgres_admin.terminate())

    assert post(registry) == "500"

    (record,) = caplog.records
    assert (record.name, record.levelno) == ("wsgi_dbsession", logging.ERROR)
    assert record.getMessage().startswith(
        "POST /notes: connection lost during COMMIT, outcome unknown: "
    )


def test_a_connection_dropped_before_the_flush_of_the_commit_is_a_rollback(
    make: MakeRegistry, postgres_admin: Admin, caplog: pytest.LogCaptureFixture
) -> None:
    """Then the COMMIT was never sent."""
    registry = make()

    def drop() -> None:
        postgres_admin.terminate()
        registry.add(Note(text="b"))

    assert post(registry, late=drop) == "500"

    (record,) = caplog.records
    assert record.getMessage().startswith("POST /notes: commit failed, rolled back: ")


def test_a_connection_that_breaks_at_autocommit_takes_nothing_with_it(
    make: MakeRegistry, postgres_database: Database
) -> None:
    """So the application may close the Session."""
    registry = make(isolation_level="AUTOCOMMIT")
    with session_scope(registry):
        registry.add(Note(text="a"))
        registry.flush()
        registry.connection().invalidate()
        registry.remove()

    assert postgres_database.notes() == ["a"]
