"""A shop that takes orders: the application of these tests, and its database."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sqlalchemy import String, create_engine, func, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from tests.support.models import make_engine
from tests.support.wsgi import Server, make_environ, make_registry
from wsgi_dbsession import SessionMiddleware
from wsgi_dbsession.idempotency import Idempotency, idempotency_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from sqlalchemy import URL, Engine
    from sqlalchemy.orm import Session, scoped_session


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(String(255), default="")


KEYS = idempotency_table(Base.metadata)

KEY = "8e03978e-40d5-43e8-bc93-6894a57f9324"
# SQLite's clients wait for each other as long as this, on a busy machine too.
PATIENCE = 60


@dataclass
class Place:
    """A database with empty tables, and all the engines that a test makes for it."""

    url: URL
    observer: Engine
    legacy: bool = False
    """Whether SQLite's driver begins transactions by its own rules."""
    engines: list[Engine] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Return the dialect's name."""
        return self.observer.dialect.name

    def engine(self, **options: Any) -> Engine:
        """Make an engine as an application has it."""
        options = {"pool_size": 25, "pool_timeout": PATIENCE, **options}
        if self.name == "sqlite":
            options["connect_args"] = {"timeout": PATIENCE}
        made = create_engine if self.legacy else make_engine
        self.engines.append(made(self.url, **options))
        return self.engines[-1]

    def registry(self, **options: Any) -> scoped_session[Session]:
        """Make a registry with an engine of its own."""
        return make_registry(self.engine(**options))

    def create(self) -> None:
        """Make the tables, or empty them."""
        Base.metadata.create_all(self.observer)
        with self.observer.begin() as connection:
            for table in Base.metadata.sorted_tables:
                if self.name == "postgresql":
                    connection.execute(text(f"TRUNCATE {table.name} RESTART IDENTITY"))
                else:
                    connection.execute(table.delete())

    def drop(self) -> None:
        """Remove the tables."""
        Base.metadata.drop_all(self.observer)

    def notes(self) -> list[str]:
        """Return the committed notes."""
        with self.observer.connect() as connection:
            return list(connection.scalars(select(Note.text).order_by(Note.text)))

    def keys(self) -> list[str | None]:
        """Return the status of each committed key."""
        with self.observer.connect() as connection:
            return list(connection.scalars(select(KEYS.c.status)))

    def close(self) -> None:
        """Close all engines; no connection may be left checked out."""
        pools: list[Any] = [engine.pool for engine in self.engines]
        left = [pool.checkedout() for pool in pools]
        for engine in [*self.engines, self.observer]:
            engine.dispose()
        assert left == [0] * len(left), f"connections were not returned: {left}"


class Shop:
    """Adds a note for each order, and counts its calls.

    :param registry: its registry.
    :param work: called in each request, with the text of the order.
    """

    def __init__(
        self,
        registry: scoped_session[Session],
        work: Callable[[str], object] = lambda text: None,
        status: str = "201 Created",
    ) -> None:
        self.registry = registry
        self.work = work
        self.status = status
        self.calls = 0
        self.lock = threading.Lock()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        with self.lock:
            self.calls += 1
        ordered = read(environ)
        note = Note(text=ordered)
        self.registry.add(note)
        self.registry.flush()
        self.work(ordered)
        headers = [
            ("Content-Type", "text/plain"),
            ("Location", f"/notes/{note.id}"),
            ("Set-Cookie", "session=secret"),
        ]
        start_response(self.status, headers)
        return [f"note {note.id}".encode()]


def read(environ: WSGIEnvironment) -> str:
    """Return the request's body, read as a careful application does."""
    length = int(environ.get("CONTENT_LENGTH") or 0)
    body: bytes = environ["wsgi.input"].read(length)
    return body.decode()


def user_of(environ: WSGIEnvironment) -> str | None:
    """Return who sends the request."""
    return environ.get("REMOTE_USER")


def protect(app: WSGIApplication, registry: scoped_session[Session], **options: Any) -> Any:
    """Put both middlewares around an application."""
    options = {"principal": user_of, **options}
    return SessionMiddleware(Idempotency(app, registry, KEYS, **options), registry)


@dataclass
class Reply:
    """What a client got."""

    status: str
    headers: dict[str, str]
    body: bytes

    @property
    def is_replayed(self) -> bool:
        """Whether the reply says that it is a stored one."""
        return self.headers.get("Idempotent-Replayed") == "true"

    @property
    def code(self) -> str:
        """The code in the problem details."""
        assert self.headers["Content-Type"] == "application/problem+json"
        problem: dict[str, Any] = json.loads(self.body)
        assert self.status == f"{problem['status']} {problem['title']}"
        code: str = problem["code"]
        return code


def order(
    app: WSGIApplication,
    body: bytes = b"tea",
    *,
    key: str | None = KEY,
    method: str = "POST",
    path: str = "/orders",
    blocks: int | None = None,
    source: object = None,
    **environ: Any,
) -> Reply:
    """Send an order, and return the reply; what is raised into the server is raised here.

    :param blocks: how many blocks the client waits for.
    :param source: the ``wsgi.input``, if it is another than that of the body.
    """
    if source is not None:
        environ["wsgi.input"] = source
    if key is not None:
        environ["HTTP_IDEMPOTENCY_KEY"] = key
    server = Server()
    server.run(app, make_environ(method, path, body, **environ), blocks=blocks)
    return Reply(server.status, dict(server.headers), server.body)


def race(threads: int, run: Callable[[int], object]) -> None:
    """Run this in so many threads at once, and raise what any of them raised."""
    barrier = threading.Barrier(threads, timeout=PATIENCE)
    errors: list[BaseException] = []

    def each(number: int) -> None:
        try:
            barrier.wait()
            run(number)
        except BaseException as error:
            errors.append(error)

    started = [threading.Thread(target=each, args=[number]) for number in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join(3 * PATIENCE)
    for error in errors:
        raise error


def count_notes(registry: scoped_session[Session]) -> int:
    """Return the number of notes that the Session sees."""
    return registry.scalar(select(func.count()).select_from(Note)) or 0
