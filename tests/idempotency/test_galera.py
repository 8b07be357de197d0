"""A key on two nodes of a Galera cluster, which take each other's rows at COMMIT only."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from tests.idempotency.shop import PATIENCE, Place, Shop, order, protect, race
from tests.support.galera import galera
from tests.support.processes import wait_until
from wsgi_dbsession.retry import RetryMiddleware

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.idempotency.shop import Reply

pytestmark = pytest.mark.clusters


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Place]]:
    """A place on each of two nodes."""
    with galera(2) as cluster:
        urls = [node.url() for node in cluster.nodes]
        places = [Place(url, create_engine(url, poolclass=NullPool)) for url in urls]
        places[0].create()
        yield places
        for place in places:
            place.close()


def has_note(node: Place) -> bool:
    """Return whether the row, and nothing else, has come to this node."""
    return node.notes() == ["tea"]


def test_a_key_takes_effect_once_on_two_nodes(nodes: list[Place]) -> None:
    """One of them is refused at its COMMIT, and the retry finds the stored response."""
    meeting = threading.Barrier(2, timeout=PATIENCE)
    calls: list[str] = []

    def meet(ordered: str) -> None:
        calls.append(ordered)
        if len(calls) <= 2:
            meeting.wait()

    apps = []
    for node in nodes:
        registry = node.registry()
        app = protect(Shop(registry, meet), registry)
        apps.append(RetryMiddleware(app, attempts=20, backoff=0.01))
    replies: list[Reply] = []

    race(4, lambda number: replies.append(order(apps[number % 2])))

    assert {(reply.status, reply.body) for reply in replies} == {("201 Created", replies[0].body)}
    assert sorted(reply.is_replayed for reply in replies) == [False, True, True, True]
    assert calls == ["tea", "tea"]
    for node in nodes:
        wait_until(partial(has_note, node), "each node has the row")
