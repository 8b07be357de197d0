"""One small application in each framework, with each way to have a Session in it.

Every peer is used as its documentation says. They differ in two functions: how a view gets at a
Session and commits (``run``), and what is put around the application.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

import bottle
import bottle_sqlalchemy
import falcon
import falcon_sqla
import flask
import flask_sqlalchemy
import flask_sqlalchemy_lite
import pyramid.config
import pyramid.response
import repoze.tm
import zope.sqlalchemy
from sqlalchemy import StaticPool, create_engine, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, scoped_session, sessionmaker

from wsgi_dbsession import SessionMiddleware, current_scope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import TypeAlias

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from sqlalchemy import Engine

OURS = "wsgi_dbsession"
NONE = "no Session"
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


# -- bare WSGI ------------------------------------------------------------------------------------


class Sized:
    """A body of one block that is no list, as frameworks return it."""

    __slots__ = ("_blocks",)

    def __init__(self, block: bytes) -> None:
        self._blocks = iter((block,))

    def __iter__(self) -> Iterator[bytes]:
        return self._blocks

    def close(self) -> None:
        pass


PLAIN = [("Content-Type", "text/plain")]
SIZED = [("Content-Type", "text/plain"), ("Content-Length", "5")]


def bare_application(run: Run | None) -> WSGIApplication:
    def as_list(_: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", SIZED)
        return [b"hello"]

    def sized(_: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", SIZED)
        return Sized(b"hello")

    def stream(_: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", PLAIN)
        return blocks("hello")

    routes: dict[str, WSGIApplication] = {"/": as_list, "/sized": sized, "/stream": stream}

    def add(path: str, operation: Operation) -> None:
        assert run is not None

        def view(_: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            block = run(operation).encode()
            start_response("200 OK", [*PLAIN, ("Content-Length", str(len(block)))])
            return [block]

        routes[path] = view

    def select_sized(_: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        assert run is not None
        text = run(SELECT)
        start_response("200 OK", SIZED)
        return Sized(text.encode())

    def select_stream(_: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        assert run is not None
        text = run(SELECT)
        start_response("200 OK", PLAIN)
        return blocks(text)

    def big(_: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        assert run is not None
        run(SELECT)
        start_response("200 OK", [*PLAIN, ("Content-Length", str(len(BIG)))])
        return [BIG]

    def big_stream(_: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        assert run is not None
        text = run(SELECT)
        start_response("200 OK", PLAIN)
        return endless(text)

    if run is not None:
        for path, operation in DATABASE_ROUTES.items():
            add(path, operation)
        routes["/select-sized"] = select_sized
        routes["/select-stream"] = select_stream
        routes["/big"] = big
        routes["/big-stream"] = big_stream

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        return routes[environ["PATH_INFO"]](environ, start_response)

    return application


class Closing:
    """Calls a function when the response is closed, as werkzeug.wsgi.ClosingIterator does."""

    __slots__ = ("_close", "_iterable", "_next")

    def __init__(self, iterable: Iterable[bytes], close: Callable[[], None]) -> None:
        self._iterable = iterable
        self._next = iter(iterable).__next__
        self._close = close

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return self._next()

    def close(self) -> None:
        try:
            close = getattr(self._iterable, "close", None)
            if close is not None:
                close()
        finally:
            self._close()


# -- the ways to run an operation -----------------------------------------------------------------


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


def zope_registry(engine: Engine) -> Any:
    registry = scoped_session(sessionmaker(engine))
    zope.sqlalchemy.register(registry)
    return registry


def bare_none(engine: Engine) -> WSGIApplication:
    return bare_application(None)


def bare_by_hand(engine: Engine) -> WSGIApplication:
    return bare_application(by_hand(engine))


def bare_thread_local(engine: Engine) -> WSGIApplication:
    registry = scoped_session(sessionmaker(engine))
    application = bare_application(committing(registry))

    def with_teardown(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            iterable = application(environ, start_response)
        except BaseException:
            registry.remove()
            raise
        return Closing(iterable, registry.remove)

    return with_teardown


def bare_repoze_tm(engine: Engine) -> WSGIApplication:
    application: WSGIApplication = repoze.tm.TM(
        bare_application(plain(zope_registry(engine))), repoze.tm.default_commit_veto
    )
    return application


def bare_ours(engine: Engine) -> WSGIApplication:
    registry = our_registry(engine)
    return SessionMiddleware(bare_application(plain(registry)), registry)


def bare_ours_on_headers(engine: Engine) -> WSGIApplication:
    registry = our_registry(engine)
    return SessionMiddleware(bare_application(plain(registry)), registry, commit_on="headers")


# -- Flask ----------------------------------------------------------------------------------------


def flask_application(run: Run | None, app: flask.Flask | None = None) -> flask.Flask:
    if app is None:
        app = flask.Flask(__name__)

    @app.get("/")
    def as_list() -> str:
        return "hello"

    @app.get("/stream")
    def stream() -> Any:
        return blocks("hello"), 200, {"Content-Type": "text/plain"}

    if run is None:
        return app

    def add(path: str, operation: Operation) -> None:
        app.add_url_rule(path, path.strip("/"), lambda: run(operation))

    for path, operation in DATABASE_ROUTES.items():
        add(path, operation)

    @app.get("/big")
    def big() -> bytes:
        run(SELECT)
        return BIG

    @app.get("/big-stream")
    def big_stream() -> Any:
        return endless(run(SELECT)), 200, {"Content-Type": "text/plain"}

    return app


def flask_none(engine: Engine) -> WSGIApplication:
    return flask_application(None)


def flask_by_hand(engine: Engine) -> WSGIApplication:
    return flask_application(by_hand(engine))


def flask_thread_local(engine: Engine) -> WSGIApplication:
    registry = scoped_session(sessionmaker(engine))
    app = flask_application(committing(registry))

    @app.teardown_appcontext
    def remove_session(_: BaseException | None) -> None:
        registry.remove()

    return app


def flask_sqlalchemy_3(engine: Engine) -> WSGIApplication:
    database = flask_sqlalchemy.SQLAlchemy(model_class=Base)
    app = flask.Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = engine.url
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = _engine_options(engine)
    database.init_app(app)
    with app.app_context():
        _create_tables(database.engine)
    return flask_application(committing(database.session), app)


def flask_sqlalchemy_lite_0(engine: Engine) -> WSGIApplication:
    database = flask_sqlalchemy_lite.SQLAlchemy()
    app = flask.Flask(__name__)
    app.config["SQLALCHEMY_ENGINES"] = {
        "default": {"url": engine.url, **_engine_options(engine)},
    }
    database.init_app(app)
    with app.app_context():
        _create_tables(database.engine)

    def run(operation: Operation) -> str:
        # Its `session` is a property that finds the Session of the application context.
        session = database.session
        text = operation.call(session)
        if operation.writes:
            session.commit()
        return text

    return flask_application(run, app)


def flask_ours(engine: Engine) -> WSGIApplication:
    registry = our_registry(engine)
    app = flask_application(plain(registry))
    app.wsgi_app = SessionMiddleware(app.wsgi_app, registry)  # type: ignore[method-assign]
    return app


# -- Bottle ---------------------------------------------------------------------------------------


def bottle_application(run: Run | None, plugin: Any = None) -> WSGIApplication:
    app: Any = bottle.Bottle()
    if plugin is not None:
        app.install(plugin)

    @app.get("/")
    def as_list() -> str:
        return "hello"

    @app.get("/stream")
    def stream() -> Iterable[bytes]:
        return blocks("hello")

    def add(path: str, operation: Operation, respond: Callable[[str], Any]) -> None:
        if plugin is not None:

            @app.get(path)
            def view_with_session(db: Any) -> Any:
                return respond(operation.call(db))

        elif run is not None:

            @app.get(path)
            def view() -> Any:
                return respond(run(operation))

    for path, operation in DATABASE_ROUTES.items():
        add(path, operation, str)
    add("/big", SELECT, lambda _: BIG)
    add("/big-stream", SELECT, endless)
    application: WSGIApplication = app
    return application


def bottle_none(engine: Engine) -> WSGIApplication:
    return bottle_application(None)


def bottle_by_hand(engine: Engine) -> WSGIApplication:
    return bottle_application(by_hand(engine))


def bottle_sqlalchemy_0(engine: Engine) -> WSGIApplication:
    return bottle_application(None, bottle_sqlalchemy.Plugin(engine))


def bottle_ours(engine: Engine) -> WSGIApplication:
    registry = our_registry(engine)
    return SessionMiddleware(bottle_application(plain(registry)), registry)


# -- Falcon ---------------------------------------------------------------------------------------


class Resource:
    def __init__(self, operation: Operation | None, run: Run | None, body: Any) -> None:
        self._operation = operation
        self._run = run
        self._body = body

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        text = "hello"
        if self._operation is not None:
            if self._run is not None:
                text = self._run(self._operation)
            else:
                text = self._operation.call(request.context.session)
        if self._body is None:
            response.text = text
        elif callable(self._body):
            response.stream = self._body(text)
        else:
            response.data = self._body


def falcon_application(
    run: Run | None, middleware: Any = None, *, database: bool = True
) -> WSGIApplication:
    app: Any = falcon.App(middleware=middleware)
    app.add_route("/", Resource(None, None, None))
    app.add_route("/stream", Resource(None, None, blocks))
    if database:
        for path, operation in DATABASE_ROUTES.items():
            app.add_route(path, Resource(operation, run, None))
        app.add_route("/big", Resource(SELECT, run, BIG))
        app.add_route("/big-stream", Resource(SELECT, run, endless))
    application: WSGIApplication = app
    return application


def falcon_none(engine: Engine) -> WSGIApplication:
    return falcon_application(None, database=False)


def falcon_by_hand(engine: Engine) -> WSGIApplication:
    return falcon_application(by_hand(engine))


def falcon_sqla_0(engine: Engine) -> WSGIApplication:
    return falcon_application(None, [falcon_sqla.Manager(engine).middleware])


def falcon_ours(engine: Engine) -> WSGIApplication:
    registry = our_registry(engine)
    return SessionMiddleware(falcon_application(plain(registry)), registry)


# -- Pyramid --------------------------------------------------------------------------------------


def pyramid_application(run: Run | None, *includes: str) -> WSGIApplication:
    config = pyramid.config.Configurator(settings={})
    for name in includes:
        config.include(name)

    def add(path: str, view: Callable[[Any], Any]) -> None:
        config.add_route(path, path)
        config.add_view(view, route_name=path)

    def respond(text: str) -> Any:
        return pyramid.response.Response(text, content_type="text/plain", charset="utf-8")

    def respond_with(iterable: Iterable[bytes]) -> Any:
        return pyramid.response.Response(app_iter=iterable, content_type="text/plain")

    add("/", lambda _: respond("hello"))
    add("/stream", lambda _: respond_with(blocks("hello")))
    if run is not None:

        def add_operation(path: str, operation: Operation) -> None:
            add(path, lambda _: respond(run(operation)))

        for path, operation in DATABASE_ROUTES.items():
            add_operation(path, operation)

        def big(_: Any) -> Any:
            run(SELECT)
            return pyramid.response.Response(body=BIG, content_type="text/plain")

        add("/big", big)
        add("/big-stream", lambda _: respond_with(endless(run(SELECT))))
    application: WSGIApplication = config.make_wsgi_app()
    return application


def pyramid_none(engine: Engine) -> WSGIApplication:
    return pyramid_application(None)


def pyramid_by_hand(engine: Engine) -> WSGIApplication:
    return pyramid_application(by_hand(engine))


def pyramid_tm_2(engine: Engine) -> WSGIApplication:
    return pyramid_application(plain(zope_registry(engine)), "pyramid_tm")


def pyramid_ours(engine: Engine) -> WSGIApplication:
    registry = our_registry(engine)
    return SessionMiddleware(pyramid_application(plain(registry)), registry)


# -- all of them ----------------------------------------------------------------------------------

APPLICATIONS: dict[str, dict[str, Callable[[Engine], WSGIApplication]]] = {
    "bare WSGI": {
        NONE: bare_none,
        BY_HAND: bare_by_hand,
        THREAD_LOCAL: bare_thread_local,
        "repoze.tm2": bare_repoze_tm,
        OURS: bare_ours,
    },
    "Flask": {
        NONE: flask_none,
        BY_HAND: flask_by_hand,
        THREAD_LOCAL: flask_thread_local,
        "Flask-SQLAlchemy": flask_sqlalchemy_3,
        "Flask-SQLAlchemy-Lite": flask_sqlalchemy_lite_0,
        OURS: flask_ours,
    },
    "Bottle": {
        NONE: bottle_none,
        BY_HAND: bottle_by_hand,
        "bottle-sqlalchemy": bottle_sqlalchemy_0,
        OURS: bottle_ours,
    },
    "Falcon": {
        NONE: falcon_none,
        BY_HAND: falcon_by_hand,
        "falcon-sqla": falcon_sqla_0,
        OURS: falcon_ours,
    },
    "Pyramid": {
        NONE: pyramid_none,
        BY_HAND: pyramid_by_hand,
        "pyramid_tm": pyramid_tm_2,
        OURS: pyramid_ours,
    },
}

# Only where connections are held: what one chooses for long streams.
STREAMING = f'{OURS}, commit_on="headers"'
VARIANTS = {"bare WSGI": {STREAMING: bare_ours_on_headers}}


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


def make_application(framework: str, peer: str, engine: Engine) -> WSGIApplication:
    return {**APPLICATIONS[framework], **VARIANTS.get(framework, {})}[peer](engine)


def application_for_server() -> WSGIApplication:
    """Make what the environment variables say, in the process of a server."""
    engine = make_engine(os.environ["BENCHMARK_URL"], int(os.environ["BENCHMARK_POOL_SIZE"]))
    return make_application(
        os.environ["BENCHMARK_FRAMEWORK"], os.environ["BENCHMARK_PEER"], engine
    )


def _engine_options(engine: Engine) -> dict[str, Any]:
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
