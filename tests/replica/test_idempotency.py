"""An answer that is replayed acknowledges a write, so it brings the position as well."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy import MetaData

from tests.replica.application import Client, make_application
from tests.replica.site import Site, behind
from wsgi_dbsession import SessionMiddleware, current_scope
from wsgi_dbsession.idempotency import Idempotency, idempotency_table

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

pytestmark = pytest.mark.xdist_group("replica")

KEY = {"HTTP_IDEMPOTENCY_KEY": "8e03978e-40d5-43e8-bc93-6894a57f9324"}


@pytest.fixture
def app(site: Site) -> Iterator[WSGIApplication]:
    """The application, which knows what it has answered."""
    metadata = MetaData()
    keys = idempotency_table(metadata)
    metadata.create_all(site.primary)
    inner = Idempotency(
        make_application(site.registry), site.registry, keys, principal=lambda _: "one"
    )
    yield site.replicas.wrap(SessionMiddleware(inner, site.registry))
    metadata.drop_all(site.primary)


def test_a_client_that_lost_the_answer_reads_what_it_wrote(
    site: Site, app: WSGIApplication
) -> None:
    """It got no cookie with the first answer, so it gets one with the second."""
    lost, client = Client(app), Client(app)
    site.wait_caught_up()
    with behind(*site.cluster.standbys):
        first = lost.send("POST", "/note", **KEY)

        assert client.send("POST", "/note", **KEY) == first

        assert client.cookies
        assert client.get() == f"1 on {site.cluster.primary.port}"


@pytest.mark.parametrize("kept", [True, False], ids=["a kept 401", "a stream"])
def test_a_refusal_of_what_took_effect_brings_the_position(site: Site, kept: bool) -> None:
    """Its status would roll back, but it tells that the first request was committed."""
    metadata = MetaData()
    keys = idempotency_table(metadata)
    metadata.create_all(site.primary)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if kept:
            current_scope().keep()
        start_response("401 Unauthorized" if kept else "201 Created", [])
        return iter([b"a", b"b"]) if not kept else [b"wrong password"]

    inner = Idempotency(app, site.registry, keys, principal=lambda _: "one")
    wrapped = site.replicas.wrap(SessionMiddleware(inner, site.registry))
    lost, client = Client(wrapped), Client(wrapped)
    lost.send("POST", "/note", **KEY)
    client.send("POST", "/note", **KEY)

    assert client.cookies
    metadata.drop_all(site.primary)


def test_a_cookie_of_a_replayed_answer_does_not_bind_forever(
    site: Site, app: WSGIApplication
) -> None:
    """It is a position like any other, which the replicas reach."""
    client = Client(app)
    client.send("POST", "/note", **KEY)
    client.send("POST", "/note", **KEY)
    site.wait_caught_up()

    assert site.is_replica(client.get())
