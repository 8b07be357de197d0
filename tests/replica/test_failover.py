"""A failover forks the log: a position counts together with its timeline."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy import create_engine

from tests.replica.site import Site, retrying, write
from tests.replica.tables import empty_tables
from tests.support.clusters import PostgresCluster, postgres_cluster
from tests.support.processes import wait_until
from wsgi_dbsession.replica import read_only_engine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.replica.site import Keep
    from tests.support.clusters import PostgresServer

pytestmark = [pytest.mark.clusters, pytest.mark.xdist_group("replica HTTP")]


@pytest.fixture
def own_cluster() -> Iterator[PostgresCluster]:
    """A primary with two standbys, of the test's own."""
    with postgres_cluster(2) as made:
        empty_tables(made.primary.url())
        made.primary.fetch("CREATE ROLE plain LOGIN")
        made.primary.fetch("GRANT SELECT ON note TO plain")
        made.wait_caught_up()
        yield made


def position(server: PostgresServer, function: str) -> int:
    found: int = server.value(f"SELECT ({function}() - '0/0')::bigint")
    return found


@pytest.mark.parametrize("user", ["postgres", "plain"])
def test_a_standby_of_the_former_primary_is_not_read(
    user: str, own_cluster: PostgresCluster, keep: Keep
) -> None:
    """It may be further in the log than the write, and does not have it.

    When it follows the new primary it is read again; a role without privileges is shown that only
    after the next restartpoint.
    """
    former, (new, standby) = own_cluster.primary, own_cluster.standbys
    new.promote()
    cluster = PostgresCluster(new, [standby], _add=own_cluster._add)
    # Before the site waits for the standby: it follows both primaries up to the fork.
    engine = read_only_engine(standby.url().set(username=user))
    site = Site(cluster, keep, [engine], caught_up=False)
    client = site.client()
    client.post()
    written = position(new, "pg_current_wal_lsn")
    while position(former, "pg_current_wal_lsn") <= written:
        former.fetch("INSERT INTO note (text) VALUES ('lost')")
    wait_until(
        lambda: position(standby, "pg_last_wal_replay_lsn") > written,
        "the standby is further than the write",
    )

    assert client.get() == f"1 on {new.port}"


@pytest.mark.parametrize("user", ["postgres", "plain"])
def test_a_standby_that_follows_the_new_primary_is_read(
    user: str, own_cluster: PostgresCluster, keep: Keep
) -> None:
    """A role without privileges is shown that after the next restartpoint."""
    new, standby = own_cluster.standbys
    own_cluster.wait_caught_up()
    own_cluster.primary.stop()
    new.promote()
    own_cluster.follow(standby, new)
    cluster = PostgresCluster(new, [standby], _add=own_cluster._add)
    site = Site(cluster, keep, [read_only_engine(standby.url().set(username=user))])
    client = site.client()
    client.post()
    cluster.wait_caught_up()
    if user == "plain":
        assert client.get() == f"1 on {new.port}"
        new.fetch("CHECKPOINT")
        wait_until(
            lambda: (
                standby.fetch("CHECKPOINT")
                or standby.value("SELECT timeline_id FROM pg_control_checkpoint()") == 2
            ),
            "the standby has a restartpoint",
        )

    assert client.get() == f"1 on {standby.port}"


@pytest.mark.parametrize("kind", ["read-only", "plain"])
def test_a_promoted_replica_refuses_writes(
    kind: str, own_cluster: PostgresCluster, keep: Keep
) -> None:
    """Also on a connection from before: such a write would have no position."""
    replica = own_cluster.standbys[0]
    make = read_only_engine if kind == "read-only" else create_engine
    site = Site(own_cluster, keep, [make(replica.url())])
    client = retrying(site, visit=write(site))
    assert site.is_replica(client.get())
    replica.promote()

    assert client.get("/visit") == str(own_cluster.primary.port)
    assert replica.value("SELECT count(*) FROM note") == 0
