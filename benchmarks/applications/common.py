"""What all applications have: the table, the operations, the ways to run them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

import zope.sqlalchemy
from sqlalchemy import StaticPool, create_engine, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, scoped_session, sessionmaker

from wsgi_dbsession import current_scope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TypeAlias

    from _typeshed.wsgi import WSGIApplication
    from sqlalchemy import Engine

OURS = "wsgi_dbsession"
NONE = "no Session"
WATCHED = f"{OURS}, watched"
BY_HAND = "with Session.begin()"
THREAD_LOCAL = "thread-local registry"

BLOCKS = 100
BIG = b"x" * 1_000_000

# What runs in a request. Given an operation, it runs it in a Session and returns its text.
Run: TypeAlias = "Callable[[Operation], str]"


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


class Operation(NamedTuple):
    """What a request does with its Session."""

    call: Callable[[Any], str]
    writes: bool


def _select(session: Any) -> str:
    text: str = session.get(Note, 1).text
    return text


def _insert(session: Any) -> str:
    session.add(Note(text="hello"))
    return "hello"


def _both(session: Any) -> str:
    session.add(Note(text="hello"))
    return _select(session)


def _count(session: Any) -> str:
    return str(session.scalar(select(func.count()).select_from(Note)))


SELECT = Operation(_select, writes=False)
INSERT = Operation(_insert, writes=True)
BOTH = Operation(_both, writes=True)
COUNT = Operation(_count, writes=False)
DATABASE_ROUTES = {"/select": SELECT, "/insert": INSERT, "/both": BOTH, "/count": COUNT}


def blocks(text: str, count: int = BLOCKS) -> Iterator[bytes]:
    block = text.encode()
    for _ in range(count):
        yield block


def endless(text: str) -> Iterator[bytes]:
    """Yield more than a slow reader will read: 1 MB."""
    block = text.encode().ljust(10_000)
    for _ in range(100):
        yield block


PLAIN = [("Content-Type", "text/plain")]
SIZED = [("Content-Type", "text/plain"), ("Content-Length", "5")]


def by_hand(engine: Engine) -> Run:
    factory = sessionmaker(engine)

    def run(operation: Operation) -> str:
        with factory.begin() as session:
            return operation.call(session)

    return run


def committing(registry: Any) -> Run:
    """The view commits what it wrote; something else ends the Session."""

    def run(operation: Operation) -> str:
        text = operation.call(registry)
        if operation.writes:
            registry.commit()
        return text

    return run


def plain(registry: Any) -> Run:
    """Something else commits and ends the Session."""

    def run(operation: Operation) -> str:
        return operation.call(registry)

    return run


def our_registry(engine: Engine) -> Any:
    return scoped_session(sessionmaker(engine), scopefunc=current_scope)


def watched(app: WSGIApplication, registry: Any) -> Any:
    """Watch the connections of an application that has our middleware."""
    # The first edition, which is measured by these files too, has none.
    watch: Any = importlib.import_module("wsgi_dbsession.watch")
    return watch.Watch(registry, warn_after=60).board(app)


def zope_registry(engine: Engine) -> Any:
    registry = scoped_session(sessionmaker(engine))
    zope.sqlalchemy.register(registry)
    return registry


def make_engine(url: str, pool_size: int = 10) -> Engine:
    """Return an engine whose database has the table and its first row."""
    if url == "sqlite://":
        engine = create_engine(
            url, poolclass=StaticPool, connect_args={"check_same_thread": False}
        )
    else:
        engine = create_engine(url, pool_size=pool_size, max_overflow=0)
    _create_tables(engine)
    return engine


def engine_options(engine: Engine) -> dict[str, Any]:
    if engine.dialect.name == "sqlite":
        return {"poolclass": StaticPool, "connect_args": {"check_same_thread": False}}
    pool: Any = engine.pool
    return {"pool_size": pool.size(), "max_overflow": 0}


def _create_tables(engine: Engine) -> None:
    # In PostgreSQL they are there already: see prepare_database().
    if engine.dialect.name == "sqlite":
        prepare_database(engine)


def prepare_database(engine: Engine) -> None:
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    with sessionmaker(engine).begin() as session:
        session.add(Note(text="hello"))
