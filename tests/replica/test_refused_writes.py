"""A write on a replica runs again on the primary, or is a clear error."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import create_engine, func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import scoped_session, sessionmaker

from tests.replica.application import PORT, Client
from tests.replica.conftest import DRIVERS
from tests.replica.site import SECRET, Site, behind, retrying, write
from tests.replica.tables import Note, empty_tables
from wsgi_dbsession import SessionMiddleware, current_scope, session_scope
from wsgi_dbsession.replica import Replicas, is_refused_write, read_only_engine
from wsgi_dbsession.retry import RetryMiddleware

if TYPE_CHECKING:
    from collections.abc import Iterable

    from _typeshed.wsgi import StartResponse, WSGIEnvironment

    from tests.replica.site import Keep
    from tests.support.clusters import PostgresCluster

pytestmark = pytest.mark.xdist_group("replica")


def test_a_get_that_writes_runs_again_on_the_primary(site: Site) -> None:
    """The client gets its response, and a cookie."""
    client = retrying(site, visit=write(site))
    with behind(*site.cluster.standbys):
        assert client.get("/visit") == str(site.cluster.primary.port)
        assert client.cookies
        assert client.get() == f"1 on {site.cluster.primary.port}"


def test_a_get_that_writes_runs_again_after_an_error_page(site: Site) -> None:
    """Frameworks turn the error into one."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            body = str(write(site)()).encode()
            start_response("200 OK", [("Content-Type", "text/plain")])
        except DBAPIError:
            start_response("500 Internal Server Error", [("Content-Type", "text/plain")])
            body = b""
        return [body]

    client = Client(
        site.replicas.wrap(RetryMiddleware(SessionMiddleware(app, site.registry), backoff=0))
    )

    assert client.get("/visit") == str(site.cluster.primary.port)


def test_a_get_that_swallows_its_refused_write_runs_again(site: Site) -> None:
    """The commit is refused, and that is retried."""

    def view() -> object:
        with contextlib.suppress(DBAPIError):
            write(site)()
        return ""

    client = retrying(site, visit=view)
    client.get("/visit")

    assert client.errors == []
    assert site.cluster.primary.value("SELECT count(*) FROM note") == 1


def test_without_retry_the_error_is_clear(site: Site) -> None:
    """It names what the application can do."""
    client = site.client(visit=write(site))

    assert client.get("/visit") == ""
    (error,) = client.errors
    assert is_refused_write(error)
    assert "current_scope().read_only = False" in "".join(getattr(error, "__notes__", ()))


def test_a_refusal_elsewhere_is_not_retried(site: Site) -> None:
    """A transaction of the primary that the application made read-only is its own business."""
    attempts: list[int] = []

    def view() -> None:
        current_scope().read_only = False
        attempts.append(1)
        site.registry.execute(text("SET TRANSACTION READ ONLY"))
        site.registry.execute(text("INSERT INTO note (text) VALUES ('x')"))

    client = retrying(site, visit=view)
    client.get("/visit")

    assert attempts == [1]
    assert is_refused_write(client.errors[0])


def test_a_refusal_on_the_primary_is_final(site: Site) -> None:
    """A further attempt is not on a replica, so there is nothing to gain by another one."""
    attempts: list[int] = []

    def view() -> None:
        attempts.append(1)
        if len(attempts) > 1:
            site.registry.execute(text("SET TRANSACTION READ ONLY"))
        site.registry.execute(text("INSERT INTO note (text) VALUES ('x')"))

    client = retrying(site, visit=view)
    client.get("/visit")

    assert len(attempts) == 2
    assert is_refused_write(client.errors[0])


def test_other_errors_are_not_retried(site: Site) -> None:
    """A replica's error is no reason by itself."""
    attempts: list[int] = []

    def view() -> None:
        attempts.append(1)
        site.registry.execute(text("SELECT nothing"))

    retrying(site, visit=view).get("/visit")

    assert attempts == [1]


def test_a_block_that_reads_writes_nowhere(site: Site) -> None:
    """Not even where the request is at its second attempt, and the primary takes its place."""
    found: list[bool] = []

    def view() -> object:
        try:
            with session_scope(site.registry, read_only=True):
                write(site)()
        except DBAPIError as error:
            found.append(is_refused_write(error))
        return write(site)()

    client = retrying(site, visit=view)

    assert client.get("/visit") == str(site.cluster.primary.port)
    assert found == [True, True]
    assert site.cluster.primary.value("SELECT count(*) FROM note") == 1


def test_a_block_that_reads_sees_what_its_request_has_committed(site: Site) -> None:
    """The position of this request counts before its client has it."""

    def view() -> object:
        site.registry.add(Note(text="x"))
        site.registry.commit()
        with session_scope(site.registry, read_only=True):
            return site.registry.scalar(select(func.count()).select_from(Note))

    client = site.client(visit=view)
    with behind(*site.cluster.standbys):
        assert client.post("/visit") == "1"


def test_a_block_that_reads_outside_of_requests_uses_a_replica(site: Site) -> None:
    """It has no client, so it may see what is old: that is what it asks for."""
    with session_scope(site.registry, read_only=True):
        assert str(site.registry.scalar(PORT)) in site.ports
    with session_scope(site.registry):
        assert str(site.registry.scalar(PORT)) not in site.ports


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("of", ["the engine", "its options"])
def test_a_primary_at_autocommit_refuses_the_writes_of_a_read_only_scope(
    of: str, driver: str, cluster: PostgresCluster, keep: Keep
) -> None:
    """PostgreSQL refuses them in a transaction; afterwards the primary is at AUTOCOMMIT again."""
    empty_tables(cluster.primary.url())
    url = cluster.primary.url(driver=driver)
    if of == "the engine":
        primary = keep(create_engine(url, isolation_level="AUTOCOMMIT", pool_size=1))
    else:
        engine = keep(create_engine(url, pool_size=1))
        primary = engine.execution_options(isolation_level="AUTOCOMMIT")
    nowhere = keep(read_only_engine(url.set(port=1)))
    replicas = Replicas(primary, [nowhere], secret=SECRET)
    registry = scoped_session(sessionmaker(class_=replicas.Session), scopefunc=current_scope)
    insert = text("INSERT INTO note (text) VALUES ('x')")

    with pytest.raises(DBAPIError) as caught, session_scope(registry, read_only=True):
        registry.execute(insert)

    assert is_refused_write(caught.value)
    with session_scope(registry):
        registry.execute(insert)
        registry.rollback()
        assert registry.scalar(select(func.count()).select_from(Note)) == 1


def test_the_primary_in_place_of_a_replica_keeps_its_isolation_level(
    cluster: PostgresCluster, keep: Keep
) -> None:
    """Only one at AUTOCOMMIT gets another, for it has no transaction to make read-only."""
    url = cluster.primary.url()
    primary = keep(create_engine(url, isolation_level="SERIALIZABLE"))
    nowhere = keep(read_only_engine(url.set(port=1)))
    replicas = Replicas(primary, [nowhere], secret=SECRET)
    registry = scoped_session(sessionmaker(class_=replicas.Session), scopefunc=current_scope)

    with session_scope(registry, read_only=True):
        assert registry.scalar(text("SHOW transaction_isolation")) == "serializable"


def test_a_plain_engine_whose_replica_was_promoted_refuses_writes(
    cluster: PostgresCluster, keep: Keep
) -> None:
    """The address of a replica may lead to a primary, which would execute them."""
    site = Site(cluster, keep, [create_engine(cluster.primary.url())])

    with pytest.raises(DBAPIError) as caught, session_scope(site.registry, read_only=True):
        write(site)()

    assert is_refused_write(caught.value)
