"""Which response carries the cookie."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any
from wsgiref.validate import validator

import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from tests.replica.application import PORT, Client, make_application
from tests.replica.conftest import DRIVERS
from tests.replica.site import SECRET, Site, behind
from tests.replica.tables import Note
from tests.support.proxy import Proxy
from tests.support.wsgi import ask
from wsgi_dbsession import SessionMiddleware, current_scope, session_scope
from wsgi_dbsession.replica import Replicas

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIEnvironment

    from tests.replica.site import Keep
    from tests.support.clusters import PostgresCluster

pytestmark = pytest.mark.xdist_group("replica")


def test_a_read_gets_none(site: Site) -> None:
    """Not even one that the primary has answered."""

    def view() -> object:
        current_scope().read_only = False
        return site.registry.scalar(PORT)

    client = site.client(pinned=view)

    assert client.get("/pinned") == str(site.cluster.primary.port)
    assert client.post("/pinned") == str(site.cluster.primary.port)
    assert client.cookies == {}


def test_a_get_that_writes_gets_one(site: Site) -> None:
    """What counts is that the transaction has written."""

    def view() -> None:
        current_scope().read_only = False
        site.registry.add(Note(text="visit"))

    client = site.client(visit=view)
    with behind(*site.cluster.standbys):
        client.get("/visit")
        assert client.get() == f"1 on {site.cluster.primary.port}"


def fail_after_commit(registry: scoped_session[Session]) -> None:
    registry.add(Note(text="x"))
    registry.commit()


def write_in_a_block(registry: scoped_session[Session]) -> None:
    with session_scope(registry):
        registry.add(Note(text="x"))


def write_in_a_hook(registry: scoped_session[Session]) -> None:
    registry.scalar(PORT)
    current_scope().on_commit(write_in_a_block, registry)


def write_without_a_session(registry: scoped_session[Session]) -> None:
    engine: Any = registry.bind
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO note (text) VALUES ('x')"))


def write_at_autocommit(registry: scoped_session[Session]) -> None:
    engine: Any = registry.bind
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("INSERT INTO note (text) VALUES ('x')"))


def roll_back_at_autocommit(registry: scoped_session[Session]) -> None:
    registry.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
    registry.execute(text("INSERT INTO note (text) VALUES ('x')"))
    registry.rollback()


@pytest.mark.parametrize(
    "write",
    [
        fail_after_commit,
        write_in_a_block,
        write_in_a_hook,
        write_without_a_session,
        write_at_autocommit,
        roll_back_at_autocommit,
    ],
)
def test_every_commit_of_a_request_counts(
    write: Callable[[scoped_session[Session]], None], site: Site
) -> None:
    """Wherever in the request it comes."""
    client = site.client(write=lambda: write(site.registry))
    with behind(*site.cluster.standbys):
        client.post("/write")
        assert client.cookies
        assert client.get() == f"1 on {site.cluster.primary.port}"


def test_a_commit_before_an_error_page_counts(site: Site) -> None:
    """The client may look for what it has done nevertheless."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        site.registry.add(Note(text="x"))
        site.registry.commit()
        start_response("500 Internal Server Error", [("Content-Type", "text/plain")])
        return [b""]

    client = site.client(app)
    client.post()

    assert client.cookies


def test_a_request_inside_of_a_request_counts(site: Site) -> None:
    """The outer one's client gets the cookie, whatever becomes of the inner response."""
    inner = site.replicas.wrap(SessionMiddleware(make_application(site.registry), site.registry))
    client = site.client(outer=lambda: ask(inner, "POST", "/inner").body)
    with behind(*site.cluster.standbys):
        client.post("/outer")
        assert client.get().startswith("1 on ")


def test_a_request_that_passes_twice_gets_one_cookie(site: Site) -> None:
    """An application may be wrapped where it is made and where it is mounted."""
    client = site.client()
    client.app = site.replicas.wrap(client.app)
    client.post()

    assert len(client.cookies) == 1


def test_each_of_two_replicas_of_one_primary_sets_its_cookie(site: Site) -> None:
    """Parts of an application may have replicas of their own."""
    client = site.client()
    other = Replicas(site.primary, site.engines, secret=SECRET, cookie="other")
    client.app = other.wrap(client.app)
    client.post()

    assert sorted(name.partition("-")[0] for name in client.cookies) == ["dbpos", "other"]


def streaming(registry: scoped_session[Session], headers: list[tuple[str, str]]) -> Any:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        registry.add(Note(text="x"))
        registry.flush()
        start_response("200 OK", [("Content-Type", "text/plain"), *headers])
        yield b"12"

    return app


@pytest.mark.parametrize(
    ("headers", "commit_on", "gets"),
    [
        pytest.param([], "complete", False, id="a stream"),
        pytest.param([("Content-Length", "2")], "complete", True, id="with Content-Length"),
        pytest.param([], "headers", True, id="commit_on=headers"),
        pytest.param([], "close", False, id="commit_on=close"),
    ],
)
def test_a_response_that_starts_before_the_commit_gets_none(
    headers: list[tuple[str, str]], commit_on: Any, gets: bool, site: Site
) -> None:
    """Its position is not known then."""
    app = SessionMiddleware(streaming(site.registry, headers), site.registry, commit_on=commit_on)
    client = Client(site.replicas.wrap(app))
    client.post()

    assert bool(client.cookies) is gets


def test_a_two_phase_commit_has_no_position(site: Site) -> None:
    """Its client reads from the primary until the cookie expires."""
    registry = scoped_session(
        sessionmaker(class_=site.replicas.Session, twophase=True), scopefunc=current_scope
    )
    client = Client(site.replicas.wrap(SessionMiddleware(make_application(registry), registry)))
    client.post()
    site.wait_caught_up()

    reader = site.client()
    reader.cookies = client.cookies
    asked: list[object] = []
    for engine in site.engines:
        event.listen(engine, "checkout", lambda *_: asked.append(1))
    assert reader.get() == f"1 on {site.cluster.primary.port}"
    assert asked == []  # no replica can be far enough


def test_a_job_commits_as_ever(cluster: PostgresCluster, keep: Keep) -> None:
    """Outside of requests no position is asked for, which costs psycopg2 a round trip."""
    url = cluster.primary.url(driver="psycopg2")
    with Proxy.to(url) as proxy:
        primary = keep(create_engine(proxy.url(url)))
        replicas = Replicas(primary, [primary], secret=SECRET)
        registry = scoped_session(sessionmaker(class_=replicas.Session), scopefunc=current_scope)
        for _ in range(2):
            proxy.reset()
            with session_scope(registry):
                registry.execute(text("INSERT INTO note (text) VALUES ('job')"))

        assert proxy.round_trips() == 3  # BEGIN, INSERT, COMMIT


def test_a_rollback_costs_what_it_always_does(cluster: PostgresCluster, keep: Keep) -> None:
    """A transaction that is rolled back has written nothing, so there is no position."""
    url = cluster.primary.url(driver="psycopg2")
    with Proxy.to(url) as proxy:
        primary = keep(create_engine(proxy.url(url)))
        replicas = Replicas(primary, [primary], secret=SECRET)
        registry = scoped_session(sessionmaker(class_=replicas.Session), scopefunc=current_scope)

        def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            registry.execute(text("INSERT INTO note (text) VALUES ('x')"))
            registry.rollback()
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [b"done"]

        client = Client(replicas.wrap(SessionMiddleware(app, registry)))
        for _ in range(2):
            proxy.reset()
            assert client.post() == "done"

        assert proxy.round_trips() == 3  # BEGIN, INSERT, ROLLBACK
        assert client.cookies == {}


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_connection_at_autocommit_that_is_lost_has_no_position(
    driver: str, cluster: PostgresCluster, keep: Keep
) -> None:
    """Its client reads from the primary, and its response is that of the application."""
    url = cluster.primary.url(driver=driver)
    with Proxy.to(url) as proxy:
        primary = keep(create_engine(proxy.url(url)))
        replicas = Replicas(primary, [primary], secret=SECRET)
        registry = scoped_session(sessionmaker(class_=replicas.Session), scopefunc=current_scope)

        def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            with primary.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.execute(text("INSERT INTO note (text) VALUES ('x')"))
                proxy.cut()
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [b"done"]

        client = Client(replicas.wrap(SessionMiddleware(app, registry)))

        assert client.post() == "done"
        assert list(client.cookies) == ["dbpos-0-ffffffffffffffff"]


def test_the_middleware_keeps_to_pep_3333(site: Site) -> None:
    """``wsgiref.validate`` has nothing to say, on both sides, with and without ``exc_info``."""

    def failing(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        try:
            raise ValueError
        except ValueError:
            start_response(
                "500 Internal Server Error",
                [("Content-Type", "text/plain")],
                sys.exc_info(),
            )
        return [b""]

    for app in (make_application(site.registry), failing):
        wrapped = validator(
            site.replicas.wrap(validator(SessionMiddleware(validator(app), site.registry)))
        )
        for method in ("GET", "POST"):
            assert ask(wrapped, method, QUERY_STRING="", SERVER_NAME="x").errors == []
