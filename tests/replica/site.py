"""An application with a primary and its replicas."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from sqlalchemy import create_engine
from sqlalchemy.orm import scoped_session, sessionmaker

from tests.replica.application import PORT, Client, make_application
from tests.replica.tables import Note, empty_tables
from wsgi_dbsession import SessionMiddleware, current_scope
from wsgi_dbsession.replica import Replicas, read_only_engine
from wsgi_dbsession.retry import RetryMiddleware

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from _typeshed.wsgi import WSGIApplication
    from sqlalchemy import Engine

    from tests.support.clusters import PostgresCluster, PostgresServer

    Keep = Callable[[Engine], Engine]


SECRET = "a secret of more than sixteen bytes"


class Site:
    """An application with a primary and its replicas."""

    def __init__(
        self,
        cluster: PostgresCluster,
        keep: Keep,
        replicas: list[Engine] | None = None,
        *,
        caught_up: bool = True,
        **options: Any,
    ) -> None:
        empty_tables(cluster.primary.url())
        if caught_up:
            cluster.wait_caught_up()
        self.cluster = cluster
        self.primary = keep(create_engine(cluster.primary.url()))
        if replicas is None:
            replicas = [read_only_engine(each.url()) for each in cluster.standbys]
        self.engines = [keep(each) for each in replicas]
        self.replicas = Replicas(
            self.primary, self.engines, **{"secret": SECRET, "pause": 0.2, **options}
        )
        self.registry = scoped_session(
            sessionmaker(class_=self.replicas.Session), scopefunc=current_scope
        )
        self.ports = {str(each.port) for each in cluster.standbys}

    def client(self, app: WSGIApplication | None = None, **views: Callable[[], object]) -> Client:
        """Return a client of the application, or of another one, with the middleware."""
        app = app or make_application(self.registry, **views)
        return Client(self.replicas.wrap(SessionMiddleware(app, self.registry)))

    def is_replica(self, body: str) -> bool:
        """Return whether the application says that it was on a replica."""
        return body.rpartition(" ")[2] in self.ports

    def wait_caught_up(self) -> None:
        self.cluster.wait_caught_up()


@contextlib.contextmanager
def behind(*standbys: PostgresServer) -> Iterator[None]:
    """Let standbys not apply what they receive."""
    for standby in standbys:
        standby.pause_replay()
    try:
        yield
    finally:
        for standby in standbys:
            standby.resume_replay()


def retrying(site: Site, **views: Callable[[], object]) -> Client:
    """Return a client of the application with a retry."""
    app = SessionMiddleware(make_application(site.registry, **views), site.registry)
    return Client(site.replicas.wrap(RetryMiddleware(app, backoff=0)))


def write(site: Site) -> Callable[[], object]:
    def view() -> object:
        site.registry.add(Note(text="x"))
        site.registry.flush()
        return site.registry.scalar(PORT)

    return view
