"""Which engines, roles and arguments there may be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_engine, event, text

from tests.replica.application import make_application
from tests.replica.site import SECRET, Site, retrying, write
from tests.support.wsgi import ask
from wsgi_dbsession import SessionMiddleware
from wsgi_dbsession.replica import Replicas, read_only_engine

if TYPE_CHECKING:
    from tests.replica.site import Keep
    from tests.support.clusters import PostgresCluster

pytestmark = pytest.mark.xdist_group("replica")


def test_replicas_may_be_plain_engines(cluster: PostgresCluster, keep: Keep) -> None:
    """Their transactions are read-only too, whatever becomes of the server."""
    site = Site(cluster, keep, [create_engine(each.url()) for each in cluster.standbys])
    client = retrying(
        site,
        visit=write(site),
        mode=lambda: site.registry.scalar(text("SHOW transaction_read_only")),
    )
    client.post()
    site.wait_caught_up()

    assert site.is_replica(client.get())
    assert client.get("/mode") == "on"
    assert client.get("/visit") == str(cluster.primary.port)


def test_a_snapshot_is_not_older_than_the_position(cluster: PostgresCluster, keep: Keep) -> None:
    """At REPEATABLE READ the question is asked in a transaction of its own."""
    engines = [
        create_engine(each.url(), isolation_level="REPEATABLE READ") for each in cluster.standbys
    ]
    site = Site(cluster, keep, engines)
    client = site.client()
    begun: list[object] = []
    for engine in site.engines:
        event.listen(engine, "begin", begun.append)
    for count in range(1, 11):
        client.post()
        site.wait_caught_up()
        begun.clear()
        assert client.get().startswith(f"{count} on ")
        assert len(begun) == 2


def test_a_plain_engine_at_autocommit_is_refused(cluster: PostgresCluster, keep: Keep) -> None:
    """PostgreSQL would execute writes on it if it was promoted."""
    urls = [each.url() for each in cluster.standbys]
    site = Site(cluster, keep, [create_engine(url, isolation_level="AUTOCOMMIT") for url in urls])
    client = site.client()
    client.get()

    assert "must be made by read_only_engine(), got Engine(" in str(client.errors[0])


def test_a_server_that_is_no_standby_has_no_position(cluster: PostgresCluster, keep: Keep) -> None:
    """The primary itself, or one that was restarted after its promotion."""
    site = Site(cluster, keep, [read_only_engine(cluster.primary.url())])
    client = site.client(mode=lambda: site.registry.scalar(text("SHOW transaction_read_only")))
    assert client.get("/mode") == "on"
    client.post()

    assert client.get("/mode") == "off"


def test_an_application_that_is_not_wrapped_is_refused(site: Site) -> None:
    """Its clients would miss what they have written."""
    app = SessionMiddleware(make_application(site.registry), site.registry)

    (error,) = ask(app).errors

    assert str(error).startswith("the application is not wrapped")
    assert ask(app, "POST").errors == []


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_wrap_inside_of_the_middleware_is_refused(method: str, site: Site) -> None:
    """The response would have started before the commit, so no client would get a cookie."""
    app = site.replicas.wrap(make_application(site.registry))

    (error,) = ask(SessionMiddleware(app, site.registry), method).errors

    assert str(error).startswith("replicas.wrap() is inside of a SessionMiddleware")


def test_a_role_without_privileges_will_do(cluster: PostgresCluster, keep: Keep) -> None:
    """It is not shown the timeline that a standby receives, but that of its last restartpoint."""
    cluster.primary.fetch("DROP ROLE IF EXISTS plain")
    cluster.primary.fetch("CREATE ROLE plain LOGIN")
    cluster.primary.fetch("GRANT SELECT ON note TO plain")
    cluster.wait_caught_up()
    urls = [each.url().set(username="plain") for each in cluster.standbys]
    site = Site(cluster, keep, [read_only_engine(url) for url in urls])
    client = site.client()
    client.post()
    site.wait_caught_up()

    assert site.is_replica(client.get())
    cluster.primary.fetch("REVOKE ALL ON note FROM plain")
    cluster.primary.fetch("DROP ROLE plain")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"replicas": []}, ValueError, "replicas must have at least one engine"),
        ({"replicas": ["postgresql://"]}, TypeError, "must be engines, got 'postgresql://'"),
        ({"secret": "short"}, ValueError, "secret must have at least 16 bytes"),
        ({"when": "GET"}, TypeError, "when must be callable, got 'GET'"),
        ({"pause": -1}, ValueError, "pause must be at least 0 seconds, got -1"),
        ({"primary": create_engine("sqlite://")}, ValueError, "primary must be an engine of"),
    ],
)
def test_an_argument_is_wrong(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    """It is found when the application is built."""
    engine = create_engine("postgresql+psycopg://host/db")
    given = {"primary": engine, "replicas": [engine], "secret": SECRET, **arguments}

    with pytest.raises(error, match=message):
        Replicas(given.pop("primary"), given.pop("replicas"), **given)
