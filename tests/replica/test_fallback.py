"""What a replica cannot answer, the primary does."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import create_engine, text

from tests.replica.application import PORT
from tests.replica.site import Site, behind, retrying
from tests.support.processes import wait_until
from tests.support.proxy import Proxy
from wsgi_dbsession.replica import read_only_engine
from wsgi_dbsession.retry import Retry

if TYPE_CHECKING:
    from tests.replica.site import Keep
    from tests.support.clusters import PostgresCluster

pytestmark = pytest.mark.xdist_group("replica")


def test_a_replica_that_is_unreachable_is_left_alone_for_a_while(
    cluster: PostgresCluster, keep: Keep, caplog: pytest.LogCaptureFixture
) -> None:
    """The others are read, then the primary; one line says so, and the pause ends."""
    first, second = cluster.standbys
    with Proxy.to(first.url()) as one, Proxy.to(second.url()) as two:
        proxies = [one, two]
        engines = [
            read_only_engine(proxy.url(first.url()), pool_size=0, max_overflow=5)
            for proxy in proxies
        ]
        for proxy, standby in zip(proxies, cluster.standbys, strict=True):
            proxy.upstream = (standby.host, standby.port)
        site = Site(cluster, keep, engines, pause=0.5)
        client = site.client()

        def ports() -> set[str]:
            return {client.get().rpartition(" ")[2] for _ in range(6)}

        assert ports() == {str(first.port), str(second.port)}
        one.refuse()
        one.cut()
        with caplog.at_level(logging.WARNING, "wsgi_dbsession"):
            assert str(second.port) in ports()
        assert "not reading from replica postgresql+psycopg://postgres@127.0.0.1" in caplog.text
        two.refuse()
        two.cut()
        wait_until(lambda: ports() == {str(cluster.primary.port)}, "both are left alone")
        one.listen()
        two.listen()
        wait_until(lambda: len(ports()) == 2, "both are tried again")


def test_a_pause_saves_the_attempts(
    cluster: PostgresCluster, keep: Keep, caplog: pytest.LogCaptureFixture
) -> None:
    """A host that does not answer is waited for once, not by each request."""
    nowhere = cluster.primary.url().set(port=1)
    site = Site(cluster, keep, [read_only_engine(nowhere)], pause=60)
    client = site.client()

    for _ in range(3):
        assert client.get() == f"0 on {cluster.primary.port}"

    assert len([each for each in caplog.records if "not reading" in each.message]) == 1


def test_a_pooled_connection_that_is_dead_is_not_the_end(
    cluster: PostgresCluster, keep: Keep, caplog: pytest.LogCaptureFixture
) -> None:
    """The question for the position finds it, and the primary answers the request."""
    url = cluster.standbys[0].url()
    with Proxy.to(url) as proxy:
        site = Site(cluster, keep, [read_only_engine(proxy.url(url))], pause=0)
        client = site.client()
        assert site.is_replica(client.get())
        client.post()
        proxy.cut()

        assert client.get() == f"1 on {cluster.primary.port}"
    assert "not reading from replica" in caplog.text


def test_a_dead_connection_without_a_question_is_retried_on_the_primary(
    cluster: PostgresCluster, keep: Keep
) -> None:
    """The first statement finds it."""
    url = cluster.standbys[0].url()
    with Proxy.to(url) as proxy:
        site = Site(cluster, keep, [read_only_engine(proxy.url(url))])
        client = retrying(site)
        assert site.is_replica(client.get())
        proxy.cut()

        assert client.get() == f"0 on {cluster.primary.port}"


def test_a_conflict_with_the_replay_is_retried_on_the_primary(site: Site) -> None:
    """A replica cancels a query that its primary's WAL stands against, with 40001."""
    attempts: list[str] = []

    def view() -> object:
        where = site.registry.scalar(PORT)
        attempts.append(str(where))
        if len(attempts) == 1:
            site.registry.execute(text("SELECT count(*), pg_sleep(60) FROM note"))
        return where

    standbys = site.cluster.standbys
    for standby in standbys:
        standby.configure(max_standby_streaming_delay="0")
    client = retrying(site, slow=view)
    asking = threading.Thread(target=client.get, args=["/slow"])
    asking.start()
    wait_until(
        lambda: any(
            standby.fetch("SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'")
            for standby in standbys
        ),
        "the query runs on a replica",
    )
    site.cluster.primary.fetch("TRUNCATE note")
    asking.join(60)

    assert len(attempts) == 2
    assert attempts[0] in site.ports
    assert attempts[1] == str(site.cluster.primary.port)
    assert client.errors == []


@pytest.mark.parametrize("replicas", ["read-only engines", "plain engines"])
def test_a_request_is_retried_after_its_replica_was_rejected(
    replicas: str, cluster: PostgresCluster, keep: Keep
) -> None:
    """To have asked a replica how far it is, is no obstacle: nothing was written there."""
    urls = [each.url() for each in cluster.standbys]
    make = read_only_engine if replicas == "read-only engines" else create_engine
    site = Site(cluster, keep, [make(url) for url in urls])
    where: list[str] = []

    def view() -> object:
        where.append(str(site.registry.scalar(PORT)))
        if len(where) == 1:
            raise Retry
        return where[-1]

    client = retrying(site, view=view)
    with behind(*cluster.standbys):
        client.post()
        assert client.get("/view") == str(cluster.primary.port)

    assert where == [str(cluster.primary.port)] * 2
    assert client.errors == []
