"""Reads on replicas never miss what their client has written."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from tests.replica.application import Client
from tests.replica.site import Site, behind
from tests.replica.tables import Note
from tests.support.proxy import Proxy
from wsgi_dbsession.replica import read_only_engine

if TYPE_CHECKING:
    from tests.replica.site import Keep
    from tests.support.clusters import PostgresCluster

pytestmark = pytest.mark.xdist_group("replica")


def test_a_client_reads_what_it_has_written(site: Site) -> None:
    """From the primary while the replicas are behind, from them as soon as they are not."""
    client, other = site.client(), site.client()
    with behind(*site.cluster.standbys):
        for count in range(1, 4):
            client.post()
            assert client.get() == f"{count} on {site.cluster.primary.port}"
        assert other.get().startswith("0 on ")
        assert site.is_replica(other.get())
    site.wait_caught_up()

    bodies = [client.get() for _ in range(4)]

    assert all(body.startswith("3 on ") and site.is_replica(body) for body in bodies)
    assert len(set(bodies)) == 2  # both in turn


def test_a_replica_that_is_behind_is_not_read(site: Site) -> None:
    """The other one is, where it comes first."""
    client = site.client()
    first, second = site.cluster.standbys
    with behind(first):
        client.post()
        site.cluster.wait_caught_up(second)
        bodies = [client.get() for _ in range(4)]

    assert {int(body.rpartition(" ")[2]) for body in bodies} == {
        second.port,
        site.cluster.primary.port,
    }
    assert {body[:1] for body in bodies} == {"1"}


def test_a_client_without_a_write_reads_from_replicas(site: Site) -> None:
    """It costs one round trip a statement, and no cookie."""
    client = site.client()

    assert site.is_replica(client.get())
    assert client.cookies == {}


def test_a_position_is_asked_for_once(cluster: PostgresCluster, keep: Keep) -> None:
    """What a connection's server has replayed stays true for this connection, and only for it."""
    url = cluster.standbys[0].url()
    with Proxy.to(url) as proxy:
        site = Site(cluster, keep, [read_only_engine(proxy.url(url))])
        client = site.client()
        client.post()
        site.wait_caught_up()
        counts = []
        for dispose in (False, False, True, False):
            if dispose:
                site.engines[0].dispose()
            client.get()
            counts.append(proxy.round_trips())
            proxy.reset()

    # The first also makes the connection, and so does the third.
    assert counts[1] == counts[3] == 2
    assert counts[2] > counts[1]


@pytest.mark.parametrize("order", [1, -1])
def test_two_writes_at_the_same_time_are_both_seen(order: int, site: Site) -> None:
    """The responses arrive in either order, and the position of the later commit counts."""
    both = threading.Barrier(2, timeout=30)

    def view() -> None:
        site.registry.add(Note(text="x"))
        both.wait()

    client = site.client(add=view)
    parts = [Client(client.app) for _ in range(2)]
    threads = [threading.Thread(target=part.post, args=["/add"]) for part in parts]
    with behind(*site.cluster.standbys):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for part in parts[::order]:
            client.cookies.update(part.cookies)
        assert client.get().startswith("2 on ")
        client.post()
        assert len(client.cookies) == 1
        assert client.get().startswith("3 on ")


@pytest.mark.parametrize(
    "cookie",
    ["dbpos-1-ffffffffffffffff=1.{}".format("0" * 32), "dbpos-1-1=1.x", "dbpos=1; ; =", "\xe9"],
)
def test_a_forged_cookie_is_ignored(cookie: str, site: Site) -> None:
    """It neither breaks the request nor leads it to the primary."""
    client = site.client()
    client.cookies["x"] = f"y; {cookie}"

    assert site.is_replica(client.get())
