"""Flush, commit, listeners and hooks see the context of the application that asked for them."""

from __future__ import annotations

import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from flask import Flask, Response, current_app, g, request, stream_with_context
from flask_login import LoginManager, current_user, login_user
from sqlalchemy import ForeignKey, event
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from werkzeug.local import Local

from tests.support.errors import AppError
from tests.support.models import Database, Note
from tests.support.moments import MOMENTS
from tests.support.wsgi import BODIES, Program, Server, ask, assert_nothing_left, make_environ
from wsgi_dbsession import (
    Observer,
    Scope,
    SessionMiddleware,
    current_scope,
    find_scope,
    session_scope,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from sqlalchemy.orm import Session, scoped_session

    from wsgi_dbsession._moment import CommitOn

    Registry = scoped_session[Session]

pytestmark = pytest.mark.promise("context")


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "user"

    id: Mapped[int] = mapped_column(primary_key=True)
    is_authenticated = is_active = True

    def get_id(self) -> str:
        return str(self.id)


class Post(Base):
    __tablename__ = "post"

    id: Mapped[int] = mapped_column(primary_key=True)
    author_id: Mapped[int] = mapped_column(ForeignKey("user.id"))
    author: Mapped[User] = relationship()


class Visit(Base):
    """Its columns are filled in when it is flushed, from what Flask has then."""

    __tablename__ = "visit"

    id: Mapped[int] = mapped_column(primary_key=True)
    path: Mapped[str] = mapped_column(default=lambda: f"{request.path} of {current_app.name}")
    who: Mapped[str] = mapped_column(default=lambda: g.who)


@pytest.fixture
def blog(sqlite_database: Database) -> Database:
    """A database with the tables of this module, and a user."""
    Base.metadata.create_all(sqlite_database.observer)
    return sqlite_database


def make_flask(registry: Registry, **options: Any) -> Flask:
    app = Flask("blog")
    app.secret_key = "secret"
    app.wsgi_app = SessionMiddleware(  # type: ignore[method-assign]
        app.wsgi_app, registry, **options
    )
    return app


# -- frameworks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("commit_on", MOMENTS)
@pytest.mark.parametrize("body", ["at once", "streamed"])
def test_a_column_default_reads_the_request(
    blog: Database, sqlite_registry: Registry, commit_on: CommitOn, body: str
) -> None:
    """Flask has popped its contexts by then, whenever the outcome comes."""
    app = make_flask(sqlite_registry, commit_on=commit_on)

    @app.post("/visits")
    def visit() -> Response:
        g.who = "ann"
        sqlite_registry.add(Visit())

        def blocks() -> Iterator[str]:
            yield "one"
            yield "two"

        return Response(["one", "two"] if body == "at once" else stream_with_context(blocks()))

    reply = ask(app, "POST", "/visits")

    assert (reply.status, reply.body, reply.errors) == ("200 OK", b"onetwo", [])
    assert blog.committed(Visit.path) == ["/visits of blog"]
    assert blog.committed(Visit.who) == ["ann"]


def test_the_current_user_is_resolved_at_the_flush(
    blog: Database, sqlite_registry: Registry
) -> None:
    """Post(author=current_user) holds flask-login's LocalProxy until then."""
    app = make_flask(sqlite_registry)
    logins = LoginManager(app)

    logins.user_loader(lambda user_id: sqlite_registry.get(User, int(user_id)))

    @app.post("/login")
    def login() -> str:
        user = User()
        sqlite_registry.add(user)
        sqlite_registry.flush()
        login_user(user)
        return ""

    @app.post("/posts")
    def post() -> tuple[str, int]:
        sqlite_registry.add(Post(author=current_user))
        return "", 201

    client = app.test_client()

    assert client.post("/login").status_code == 200
    assert client.post("/posts").status_code == 201
    assert blog.committed(Post.author_id) == blog.committed(User.id) == [1]


EVENTS = ["before_commit", "before_flush", "after_flush", "after_commit", "after_rollback"]


@pytest.mark.parametrize("place", [*EVENTS, "on_commit", "on_rollback", "an observer"])
def test_whatever_runs_at_the_outcome_sees_flask(
    blog: Database, sqlite_registry: Registry, place: str
) -> None:
    """Listeners, hooks and observers have request, g, current_app and the scope."""
    seen: list[tuple[object, ...]] = []
    scopes: list[Scope] = []

    def look(*_: object) -> None:
        scope = find_scope()
        seen.append((request.path, g.who, current_app.name, scope is scopes[0]))

    class Looking(Observer):
        def settled(self, scope: Scope) -> None:
            look()

    if place in EVENTS:
        event.listen(sqlite_registry.session_factory, place, look)
    app = make_flask(sqlite_registry, observers=[Looking()] if place == "an observer" else [])

    @app.get("/here")
    def view() -> tuple[str, int]:
        g.who = "ann"
        scopes.append(scope := current_scope())
        sqlite_registry.add(Note())
        if place.startswith("on_"):
            getattr(scope, place)(look)
        return "", 409 if place.endswith("rollback") else 200

    assert ask(app, path="/here").errors == []

    assert seen == [("/here", "ann", "blog", True)]


def test_a_block_that_outlives_the_application_context(
    blog: Database, sqlite_registry: Registry
) -> None:
    """A job that pushes Flask's context inside of its block flushes in it all the same."""
    app = Flask("blog")

    with session_scope(sqlite_registry), app.test_request_context("/job"):
        g.who = "cron"
        sqlite_registry.add(Visit())

    assert blog.committed(Visit.path) == ["/job of blog"]


# -- context variables ----------------------------------------------------------------------------

variable = contextvars.ContextVar("variable", default="none")


def test_the_outcome_sees_where_the_session_was_last_asked_for(
    sqlite_registry: Registry,
) -> None:
    """Not where it was first, and not what was set after the last time."""
    seen: list[str] = []
    event.listen(
        sqlite_registry.session_factory, "before_commit", lambda _: seen.append(variable.get())
    )

    def work() -> None:
        with session_scope(sqlite_registry):
            for value in ("first", "last"):
                variable.set(value)
                session = sqlite_registry()
            variable.set("after")
            session.add(Note())  # which begins the transaction

    contextvars.copy_context().run(work)

    assert seen == ["last"]


def test_a_hook_sees_where_it_was_registered(sqlite_registry: Registry) -> None:
    """Each its own place, wherever the Session was asked for."""
    seen: list[str] = []

    def work() -> None:
        with session_scope(sqlite_registry) as scope:
            for value in ("first", "second"):
                variable.set(value)
                scope.on_commit(lambda: seen.append(variable.get()))
            variable.set("after")
            sqlite_registry.add(Note())

    contextvars.copy_context().run(work)

    assert seen == ["first", "second"]


@pytest.mark.parametrize("commit_on", MOMENTS)
@pytest.mark.parametrize("body", ["list body", "unsized generator", "write()"])
def test_what_is_set_at_the_outcome_is_not_seen_outside(
    sqlite_database: Database, sqlite_registry: Registry, body: str, commit_on: CommitOn
) -> None:
    """Listeners and hooks have a context of their own, and the scope is not left in it."""
    calls: list[str] = []

    def set_variable(*_: object) -> None:
        calls.append(variable.get())
        variable.set("at the outcome")

    event.listen(sqlite_registry.session_factory, "before_commit", set_variable)
    after: list[str] = []

    def early() -> None:
        current_scope().on_commit(set_variable)
        current_scope().on_commit(set_variable)
        sqlite_registry.add(Note(text="a"))

    program = Program(early, closing=lambda: after.append(variable.get()))
    app = SessionMiddleware(BODIES[body](program), sqlite_registry, commit_on=commit_on)

    Server().run(app, make_environ())

    assert calls == ["none"] * 3
    assert set(after) <= {"none"}
    assert variable.get() == "none"
    assert sqlite_database.notes() == ["a"]
    assert_nothing_left(sqlite_registry)


def test_the_rollback_sees_the_context_too(sqlite_registry: Registry) -> None:
    """Though an error has left everything that the application had entered."""
    seen: list[str] = []
    event.listen(
        sqlite_registry.session_factory, "after_rollback", lambda _: seen.append(variable.get())
    )
    with pytest.raises(AppError), session_scope(sqlite_registry) as scope:
        token = variable.set("within")
        sqlite_registry.add(Note())
        sqlite_registry.flush()
        scope.on_rollback(lambda: seen.append(variable.get()))
        variable.reset(token)
        assert variable.get() == "none"
        raise AppError

    assert seen == ["within", "within"]


def test_a_hook_without_a_session_has_its_context(sqlite_registry: Registry) -> None:
    """The outcome of a scope that asked for no Session runs where the step ends."""
    seen: list[object] = []
    with session_scope(sqlite_registry) as scope:
        token = variable.set("within")
        scope.on_commit(lambda: seen.extend([variable.get(), current_scope() is scope]))
        variable.reset(token)

    assert seen == ["within", True]


# -- many at once ---------------------------------------------------------------------------------

local = Local()
NAMES = ["/ann", "/bob", "/cid", "/dan"]


def in_threads(serve: Callable[[str], object]) -> None:
    with ThreadPoolExecutor(len(NAMES)) as threads:
        list(threads.map(serve, NAMES))


def in_greenlets(serve: Callable[[str], object]) -> None:
    greenlets = [gevent.spawn(serve, name) for name in NAMES]
    gevent.joinall(greenlets, timeout=60, raise_error=True)
    assert all(each.dead for each in greenlets)


@pytest.mark.parametrize("many", [in_threads, in_greenlets])
@pytest.mark.parametrize("body", ["list", "generator"])
def test_proxies_are_resolved_in_each_request_of_many(
    postgres_database: Database,
    postgres_registry: Registry,
    many: Callable[[Callable[[str], object]], None],
    body: str,
) -> None:
    """Werkzeug's LocalProxy, popped before the outcome, while all of them are in theirs."""
    barrier = threading.Barrier(len(NAMES))
    user: Any = local("user")
    hooks: list[str] = []

    def meet() -> None:
        if many is in_threads:
            barrier.wait(60)
        else:
            for _ in range(3):
                gevent.sleep(0)

    def before_flush(session: Session, *_: object) -> None:
        meet()
        for note in session.new:
            note.text = f"{note.text} by {user.strip('/')}"

    event.listen(postgres_registry.session_factory, "before_flush", before_flush)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        local.user = environ["PATH_INFO"]
        meet()
        postgres_registry.add(Note(text=environ["PATH_INFO"]))
        current_scope().on_commit(lambda: hooks.append(str(user)))
        start_response("200 OK", [])
        del local.user
        return [b"one"] if body == "list" else iter([b"one"])

    wrapped = SessionMiddleware(app, postgres_registry)

    def serve(name: str) -> None:
        Server().run(wrapped, make_environ(path=name))
        assert find_scope() is None
        with pytest.raises(AttributeError):
            _ = local.user

    many(serve)

    assert postgres_database.notes() == [f"{name} by {name[1:]}" for name in NAMES]
    assert sorted(hooks) == NAMES
