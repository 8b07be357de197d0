"""Where no connection could be made, nothing was sent: another attempt by choice."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError

from tests.retry.applications import flask_app, list_app, protect
from tests.retry.databases import add_note
from tests.support.errors import AppError
from tests.support.models import Book
from tests.support.proxy import Proxy
from tests.support.wsgi import drive, make_registry
from wsgi_dbsession.retry import run_transaction

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Engine

    from tests.support import postgres
    from tests.support.models import Database

pytestmark = pytest.mark.promise("run again")

SHAPES = pytest.mark.parametrize("shape", [list_app, flask_app], ids=["raised", "error page"])


@pytest.fixture
def proxy(postgres_database: Database) -> Iterator[Proxy]:
    """A way to PostgreSQL that can be closed."""
    with Proxy.to(postgres_database.url) as made:
        yield made


@pytest.fixture
def proxied(proxy: Proxy, driver: str, postgres_database: Database) -> Iterator[Engine]:
    """An engine of each driver that takes this way."""
    url = postgres_database.url.set(drivername=f"postgresql+{driver}")
    engine = create_engine(proxy.url(url))
    yield engine
    engine.dispose()


def refuse(proxy: Proxy, times: int) -> Callable[[], int]:
    """Refuse connections in the first attempts; the result counts them."""
    attempts: list[None] = []

    def count() -> int:
        attempts.append(None)
        if len(attempts) <= times:
            proxy.refuse()
        else:
            proxy.listen()
        return len(attempts)

    return count


@SHAPES
def test_a_refused_connection_is_retried_by_choice(
    shape: Any,
    proxy: Proxy,
    proxied: Engine,
    postgres_database: Database,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The database comes back, and the client waits a little longer."""
    caplog.set_level(logging.INFO, "wsgi_dbsession")
    registry = make_registry(proxied)
    count = refuse(proxy, 2)
    numbers: list[int] = []

    def work() -> None:
        numbers.append(count())
        add_note(registry)

    app = protect(shape(work), registry, retry_connect=True)

    assert drive(app, "POST").body == b"done"
    assert numbers == [1, 2, 3]
    assert postgres_database.notes() == ["note"]
    retries = [message for message in caplog.messages if message.startswith("retrying POST /path")]
    assert len(retries) == 2


def test_a_job_waits_for_the_database_by_choice(
    proxy: Proxy, proxied: Engine, postgres_database: Database
) -> None:
    """The same for ``run_transaction``."""
    registry = make_registry(proxied)
    count = refuse(proxy, 1)

    def job() -> None:
        count()
        add_note(registry)

    run_transaction(job, registry, backoff=0, retry_connect=True)
    assert postgres_database.notes() == ["note"]


@SHAPES
def test_a_refused_connection_is_an_error_at_once_by_default(
    shape: Any, proxy: Proxy, proxied: Engine
) -> None:
    """The server that is down for long would make every client wait."""
    registry = make_registry(proxied)
    count = refuse(proxy, 9)
    numbers: list[int] = []

    def work() -> None:
        numbers.append(count())
        add_note(registry)

    app = protect(shape(work), registry)
    if shape is list_app:
        with pytest.raises(DBAPIError):
            drive(app, "POST")
    else:
        assert drive(app, "POST").status[:3] == "500"
    assert numbers == [1]


def test_another_error_of_the_database_is_not_taken_for_a_refused_connection(
    engine: Engine,
) -> None:
    """The error of a COMMIT has no statement either."""
    registry = make_registry(engine)
    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        registry.add(Book(author_id=7))

    with pytest.raises(DBAPIError):
        drive(protect(list_app(work), registry, retry_connect=True), "POST")
    assert len(attempts) == 1


def test_an_error_after_a_refused_connection_is_the_cause(proxy: Proxy, proxied: Engine) -> None:
    """The application went on without the database, and failed at something else."""
    registry = make_registry(proxied)
    proxy.refuse()
    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        try:
            add_note(registry)
        except DBAPIError:
            registry.rollback()
        raise AppError

    with pytest.raises(AppError):
        drive(protect(list_app(work), registry, retry_connect=True), "POST")
    assert len(attempts) == 1


def test_a_failed_pre_ping_is_not_a_failure_to_connect(
    engine: Engine, postgres_admin: postgres.Admin
) -> None:
    """SQLAlchemy opens another connection then, and the application fails at something else."""
    pinging = create_engine(engine.url, pool_pre_ping=True)
    registry = make_registry(pinging)
    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        registry.execute(text("SELECT 1"))
        raise AppError

    with pinging.connect():
        pass
    assert postgres_admin.terminate() == 1

    reply = drive(protect(flask_app(work), registry, retry_connect=True), "POST")
    pinging.dispose()

    assert (reply.status[:3], len(attempts)) == ("500", 1)


def test_nothing_is_run_again_if_something_was_committed_elsewhere(
    proxy: Proxy, proxied: Engine, postgres_database: Database
) -> None:
    """That one database was not reached does not undo what another one has."""
    registry, other = make_registry(proxied), make_registry(postgres_database.engine)
    proxy.refuse()
    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        add_note(other)
        other.commit()
        add_note(registry)

    with pytest.raises(DBAPIError):
        drive(protect(list_app(work), registry, other, retry_connect=True), "POST")
    assert len(attempts) == 1
    assert postgres_database.notes() == ["note"]


def test_a_database_that_does_not_exist_is_one_more_failure_to_connect(
    driver: str, postgres_database: Database
) -> None:
    """Libpq has no codes for them, so all are retried alike."""
    url = postgres_database.url.set(drivername=f"postgresql+{driver}", database="nonsense")
    engine = create_engine(url)
    registry = make_registry(engine)
    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        add_note(registry)

    with pytest.raises(DBAPIError):
        drive(protect(list_app(work), registry, retry_connect=True), "POST")
    assert len(attempts) == 3
    engine.dispose()
