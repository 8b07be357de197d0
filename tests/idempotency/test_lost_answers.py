"""The client does not know what became of its request, and repeats it: it takes effect once."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import DBAPIError

from tests.idempotency.shop import PATIENCE, Shop, order, protect
from tests.support.proxy import Proxy
from tests.support.wsgi import make_registry
from wsgi_dbsession.retry import RetryMiddleware

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.orm import Session, scoped_session

    from tests.idempotency.shop import Place


@pytest.fixture
def proxy(server: Place) -> Iterator[Proxy]:
    """A network between the application and each database."""
    with Proxy.to(server.url) as made:
        yield made


@pytest.fixture
def distant(server: Place, proxy: Proxy) -> Iterator[scoped_session[Session]]:
    """A registry whose connections go through that network."""
    engine = create_engine(proxy.url(server.url))
    sockets: list[Any] = []

    def keep(connection: object, record: object) -> None:
        # pg8000 forgets them, not closed, where it cannot say goodbye to the server.
        sockets.extend(getattr(connection, name, None) for name in ("_sock", "_usock"))

    event.listen(engine, "connect", keep)
    yield make_registry(engine)
    engine.dispose()
    for each in filter(None, sockets):
        with contextlib.suppress(OSError):
            each.close()


def in_both(shop: Shop, retry: bool) -> Any:
    """Put the middlewares around the application, with RetryMiddleware or without."""
    app = protect(shop, shop.registry)
    return RetryMiddleware(app, backoff=0) if retry else app


@pytest.mark.parametrize("retry", [False, True], ids=["without retry", "with retry"])
def test_the_answer_to_commit_is_lost(
    retry: bool, server: Place, proxy: Proxy, distant: scoped_session[Session]
) -> None:
    """The transaction was committed: the second try gets the stored 201, and there is one row."""
    shop = Shop(distant)
    app = in_both(shop, retry)
    lost = proxy.eat_commit_answer()

    with pytest.raises(DBAPIError):
        order(app)
    assert lost.wait(PATIENCE)
    again = order(app)

    assert (again.status, again.is_replayed) == ("201 Created", True)
    assert again.body.startswith(b"note ")
    assert shop.calls == 1
    assert server.notes() == ["tea"]


@pytest.mark.parametrize("retry", [False, True], ids=["without retry", "with retry"])
def test_the_commit_is_lost_before_the_database_gets_it(
    retry: bool, server: Place, proxy: Proxy, distant: scoped_session[Session]
) -> None:
    """The transaction was rolled back: the second try runs, and there is one row."""
    shop = Shop(distant)
    app = in_both(shop, retry)
    lost = proxy.eat_commit()

    with pytest.raises(DBAPIError):
        order(app)
    assert lost.wait(PATIENCE)
    again = order(app)

    assert (again.status, again.is_replayed) == ("201 Created", False)
    assert shop.calls == 2
    assert server.notes() == ["tea"]


def test_the_connection_breaks_in_the_midst(
    server: Place, proxy: Proxy, distant: scoped_session[Session]
) -> None:
    """With retry the client notices nothing of that either."""
    broken = iter([proxy.cut])
    shop = Shop(distant, lambda text: next(broken, lambda: 0)())
    app = in_both(shop, retry=True)

    reply = order(app)

    assert (reply.status, reply.is_replayed) == ("201 Created", False)
    assert shop.calls == 2
    assert server.notes() == ["tea"]
    assert order(app).is_replayed


def test_the_database_restores_a_connection_that_was_found_dead(
    server: Place, proxy: Proxy, distant: scoped_session[Session]
) -> None:
    """The claim is the first statement on it; RetryMiddleware sends it on a new connection."""
    app = in_both(Shop(distant), retry=True)
    order(app, key="before")
    proxy.cut()

    assert order(app).status == "201 Created"
    assert server.notes() == ["tea", "tea"]


def test_the_response_is_lost(server: Place) -> None:
    """The client was gone before the first block: its second try gets the response."""
    registry = server.registry()
    app = protect(Shop(registry), registry)

    assert order(app, blocks=0).body == b""
    again = order(app)

    assert again.is_replayed
    assert again.body.startswith(b"note ")
    assert server.notes() == ["tea"]


@pytest.mark.parametrize("decision", ["COMMIT", "ROLLBACK"])
def test_a_transaction_in_doubt_keeps_the_key(decision: str, postgres: Place) -> None:
    """What was prepared blocks the second try, until it is committed or rolled back."""
    with Proxy.to(postgres.url) as proxy:
        engine = create_engine(proxy.url(postgres.url))
        distant = make_registry(engine, twophase=True)
        event.listen(engine, "commit_twophase", lambda *_: proxy.cut())
        with pytest.raises(DBAPIError):
            order(protect(Shop(distant), distant))
        engine.dispose()
    registry = postgres.registry(connect_args={"options": "-c lock_timeout=50ms"})
    app = protect(Shop(registry), registry)

    assert order(app).code == "in_progress"
    with postgres.observer.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT")
        gid = connection.scalar(text("SELECT gid FROM pg_prepared_xacts"))
        connection.exec_driver_sql(f"{decision} PREPARED '{gid}'")

    assert order(app).is_replayed == (decision == "COMMIT")
    assert postgres.notes() == ["tea"]
