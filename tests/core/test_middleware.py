"""The middleware: what it refuses when it is built, nesting, skipping, the veto."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import webtest
from sqlalchemy import text
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from tests.support.errors import Kill
from tests.support.models import Database, Note, make_engine
from tests.support.wsgi import (
    BODIES,
    Program,
    Server,
    ask,
    assert_nothing_left,
    make_environ,
    make_registry,
)
from wsgi_dbsession import (
    NoScopeError,
    Scope,
    SessionMiddleware,
    current_scope,
    default_commit_veto,
    session_scope,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    from tests.support.wsgi import Headers
    from wsgi_dbsession._moment import CommitOn


class VetoError(Exception):
    """The error of a veto."""


def hello(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"hello"]


def write_note(registry: scoped_session[Session], note: str) -> WSGIApplication:
    """Make an application that writes a note, and answers with the status that is asked for."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        registry.add(Note(text=note))
        registry.flush()
        status = environ["QUERY_STRING"].replace("+", " ") or "200 OK"
        start_response(status, [("Content-Type", "text/plain")])
        return [note.encode()]

    return app


# -- construction ---------------------------------------------------------------------------------


@pytest.mark.promise("constructors")
@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        pytest.param(
            {"app": "hello"},
            TypeError,
            r"app must be the WSGI application, a callable, got 'hello'",
            id="an application that is none",
        ),
        pytest.param(
            {"commit_on": "end"},
            ValueError,
            "commit_on must be .*, \"auto\" or callable, got 'end'",
            id="an unknown commit_on",
        ),
        pytest.param(
            {"commit_on": []},
            ValueError,
            r"commit_on must be .*, got \[\]",
            id="a commit_on that is no string",
        ),
        pytest.param(
            {"commit_veto": "4xx"},
            TypeError,
            "commit_veto must be None or callable, got '4xx'",
            id="a veto that is not callable",
        ),
        pytest.param(
            {"commit_error": 503},
            TypeError,
            r"commit_error must be None or callable, got 503",
            id="a commit_error that is not callable",
        ),
        pytest.param(
            {"skip": "/static"},
            TypeError,
            r"skip must be None or callable, got '/static'",
            id="a skip that is not callable",
        ),
    ],
)
def test_a_wrong_argument_is_refused(
    arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    """When the middleware is built, not at the first request; the message names the mend."""
    registry = scoped_session(sessionmaker(), scopefunc=current_scope)
    app = arguments.pop("app", hello)

    with pytest.raises(kind, match=message):
        SessionMiddleware(app, registry, **arguments)


@pytest.mark.promise("constructors")
def test_a_middleware_needs_a_registry() -> None:
    """None at all is refused, with the fix."""
    with pytest.raises(ValueError, match=r"registries must not be empty\. .*scoped_session\("):
        SessionMiddleware(hello)


@pytest.mark.promise("constructors")
def test_a_session_in_place_of_the_application_is_refused() -> None:
    """The application comes first: a registry alone is callable, too."""
    registry = scoped_session(sessionmaker(), scopefunc=current_scope)

    with pytest.raises(TypeError, match=r"app must be .*SessionMiddleware\(app, Session\)"):
        SessionMiddleware(registry)  # type: ignore[arg-type]


def test_the_application_can_be_reached(sqlite_registry: scoped_session[Session]) -> None:
    """As ``app``, for tools that walk along the stack of middlewares."""
    assert SessionMiddleware(hello, sqlite_registry).app is hello


# -- requests -------------------------------------------------------------------------------------


@pytest.mark.promise("unused")
def test_a_request_costs_nothing_that_it_does_not_use(
    sqlite_database: Database, sqlite_registry: scoped_session[Session]
) -> None:
    """No Session, no connection, no transaction."""
    seen: list[bool] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        seen.append(bool(current_scope().sessions))
        return hello(environ, start_response)

    client = webtest.TestApp(SessionMiddleware(app, sqlite_registry))

    assert client.get("/").text == "hello"
    assert seen == [False]
    pool: Any = sqlite_database.engine.pool
    assert pool.checkedin() == 0


def test_a_request_works_and_is_committed(
    database: Database, registry: scoped_session[Session]
) -> None:
    """The whole way, by a client."""
    client = webtest.TestApp(SessionMiddleware(write_note(registry, "a"), registry))

    assert client.post("/").text == "a"
    assert database.notes() == ["a"]
    client.post("/?404+Not+Found", status=404)
    assert database.notes() == ["a"]


@pytest.mark.promise("unused")
def test_a_request_that_is_skipped_passes_untouched(
    sqlite_registry: scoped_session[Session],
) -> None:
    """The application gets the server's own start_response, no scope, and nothing in environ."""
    server = Server()
    starts: list[StartResponse] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        starts.append(start_response)
        with pytest.raises(NoScopeError):
            current_scope()
        assert "wsgi_dbsession.scope" not in environ
        return hello(environ, start_response)

    wrapped = SessionMiddleware(
        app, sqlite_registry, skip=lambda environ: environ["PATH_INFO"] == "/ping"
    )

    server.run(wrapped, make_environ(path="/ping"))

    assert starts == [server.start_response]
    assert server.written == [b"hello"]


def test_a_request_that_is_not_skipped_has_a_scope(
    sqlite_database: Database, sqlite_registry: scoped_session[Session]
) -> None:
    """It is asked for each request."""
    app = write_note(sqlite_registry, "a")
    wrapped = SessionMiddleware(
        app, sqlite_registry, skip=lambda environ: environ["PATH_INFO"] == "/ping"
    )

    ask(wrapped)

    assert sqlite_database.notes() == ["a"]


# -- the veto -------------------------------------------------------------------------------------


@pytest.mark.promise("veto")
@pytest.mark.parametrize(
    ("status", "vetoed"),
    [
        ("200 OK", False),
        ("204 No Content", False),
        ("303 See Other", False),
        ("400 Bad Request", True),
        ("499 Anything", True),
        ("500 Internal Server Error", True),
        ("599 Anything", True),
    ],
)
def test_the_default_veto_is_for_errors(status: str, vetoed: bool) -> None:
    """4xx and 5xx, nothing else."""
    assert default_commit_veto({}, status, []) is vetoed


@pytest.mark.promise("veto")
@pytest.mark.parametrize("commit_on", ["complete", "headers", "close"])
@pytest.mark.parametrize("body", BODIES)
def test_a_veto_is_asked_with_environ_status_and_headers(
    sqlite_database: Database,
    sqlite_registry: scoped_session[Session],
    body: str,
    commit_on: CommitOn,
) -> None:
    """It has the signature of repoze.tm2, and its word counts."""
    asked: list[tuple[WSGIEnvironment, str, Headers]] = []

    def veto(environ: WSGIEnvironment, status: str, headers: Headers) -> bool:
        asked.append((environ, status, headers))
        return ("X-Tm", "abort") in headers

    environ = make_environ("POST")
    program = Program(
        early=lambda: sqlite_registry.add(Note(text="a")), headers=[("X-Tm", "abort")]
    )
    app = SessionMiddleware(
        BODIES[body](program), sqlite_registry, commit_veto=veto, commit_on=commit_on
    )

    Server().run(app, environ)

    headers = program.headers if body != "generator with a length" else program.with_length()
    assert asked == [(environ, "200 OK", headers)]
    assert sqlite_database.notes() == []


def test_without_a_veto_every_status_is_committed(
    sqlite_database: Database, sqlite_registry: scoped_session[Session]
) -> None:
    """commit_veto=None, for applications that roll back themselves."""
    app = SessionMiddleware(write_note(sqlite_registry, "a"), sqlite_registry, commit_veto=None)

    ask(app, QUERY_STRING="500+Oops")

    assert sqlite_database.notes() == ["a"]


@pytest.mark.promise("veto")
def test_an_interruption_of_the_veto_is_a_rollback(
    sqlite_registry: scoped_session[Session],
) -> None:
    """Its hooks are called."""
    calls: list[str] = []

    def veto(environ: WSGIEnvironment, status: str, headers: Headers) -> bool:
        raise Kill

    def early() -> None:
        sqlite_registry.add(Note(text="a"))
        current_scope().on_rollback(calls.append, "rolled back")

    app = SessionMiddleware(BODIES["list body"](Program(early)), sqlite_registry, commit_veto=veto)

    with pytest.raises(Kill):
        Server().run(app, make_environ())

    assert calls == ["rolled back"]


@pytest.mark.promise("veto")
@pytest.mark.parametrize("body", BODIES)
def test_a_veto_that_raises_rolls_back_and_raises(
    sqlite_database: Database, sqlite_registry: scoped_session[Session], body: str
) -> None:
    """A veto that raises cannot allow the commit."""
    scopes: list[Scope] = []

    def veto(environ: WSGIEnvironment, status: str, headers: Headers) -> bool:
        raise VetoError

    def early() -> None:
        scopes.append(current_scope())
        sqlite_registry.add(Note(text="a"))

    program = Program(early)
    app = SessionMiddleware(
        BODIES[body](program), sqlite_registry, commit_veto=veto, commit_error=hello
    )

    with pytest.raises(VetoError):
        Server().run(app, make_environ())

    (scope,) = scopes
    assert (scope.outcome, scope.reason) == ("rollback", "error")
    assert sqlite_database.notes() == []


# -- nesting --------------------------------------------------------------------------------------


@pytest.mark.promise("nested middleware")
@pytest.mark.parametrize("status", ["200 OK", "404 Not Found"])
def test_the_outermost_middleware_decides(
    sqlite_database: Database, sqlite_registry: scoped_session[Session], status: str
) -> None:
    """Within one environ there is one scope; the inner middleware has no say, and no veto."""
    scopes: list[Scope] = []
    inner = SessionMiddleware(
        write_note(sqlite_registry, "inner"),
        sqlite_registry,
        commit_on="close",
        commit_veto=lambda environ, status, headers: True,
    )

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        scope = current_scope()
        sqlite_registry.add(Note(text="outer"))
        blocks = inner(environ, start_response)
        assert current_scope() is scope is environ["wsgi_dbsession.scope"]
        assert sqlite_database.notes() == []
        scopes.append(scope)
        return blocks

    ask(SessionMiddleware(app, sqlite_registry), QUERY_STRING=status.replace(" ", "+"))

    committed = status == "200 OK"
    assert scopes[0].outcome == ("commit" if committed else "rollback")
    assert sqlite_database.notes() == (["inner", "outer"] if committed else [])


@pytest.mark.promise("nested middleware")
@pytest.mark.parametrize("status", ["200 OK", "404 Not Found"])
def test_the_outermost_middleware_ends_the_sessions_of_the_inner(
    sqlite_database: Database,
    sqlite_registry: scoped_session[Session],
    tmp_path: Path,
    status: str,
) -> None:
    """A registry that only the nested middleware knows shares the outcome."""
    other = make_registry(make_engine(f"sqlite:///{tmp_path / 'other.db'}"))
    with session_scope(other):
        other.execute(text("CREATE TABLE note (id INTEGER PRIMARY KEY, text TEXT)"))
    inner = SessionMiddleware(write_note(other, "inner"), other, sqlite_registry)

    ask(SessionMiddleware(inner, sqlite_registry), QUERY_STRING=status.replace(" ", "+"))

    with session_scope(other):
        rows = other.scalars(text("SELECT text FROM note")).all()
    assert rows == (["inner"] if status == "200 OK" else [])
    assert_nothing_left(other, sqlite_registry)
    other.session_factory.kw["bind"].dispose()


@pytest.mark.promise("in-process requests")
def test_a_request_within_a_request_has_a_scope_of_its_own(
    postgres_database: Database, postgres_registry: scoped_session[Session]
) -> None:
    """A client in the process: the inner request is committed, the outer one is rolled back."""
    app: SessionMiddleware

    def inner_or_outer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/inner":
            return write_note(postgres_registry, "inner")(environ, start_response)
        scope, session = current_scope(), postgres_registry()
        session.add(Note(text="outer"))
        session.flush()
        assert webtest.TestApp(app).post("/inner").text == "inner"
        assert current_scope() is scope
        assert postgres_registry() is session
        assert postgres_database.notes() == ["inner"]
        start_response("404 Not Found", [("Content-Type", "text/plain")])
        return [b"outer"]

    app = SessionMiddleware(inner_or_outer, postgres_registry)

    webtest.TestApp(app).post("/", status=404)

    assert postgres_database.notes() == ["inner"]


@pytest.mark.promise("in-process requests")
def test_a_copy_of_the_environ_is_another_request(
    sqlite_registry: scoped_session[Session],
) -> None:
    """Though it has the scope of the one that it was copied from."""
    scopes = []

    def inner(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        scopes.append(current_scope())
        start_response("200 OK", [])
        return []

    nested = SessionMiddleware(inner, sqlite_registry)

    def outer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        scopes.append(current_scope())
        return nested({**environ}, start_response)

    Server().run(SessionMiddleware(outer, sqlite_registry), make_environ())

    assert scopes[0] is not scopes[1]


@pytest.mark.promise("in-process requests")
def test_a_request_within_a_block_has_a_scope_of_its_own(
    postgres_database: Database, postgres_registry: scoped_session[Session]
) -> None:
    """A test that holds a scope open sees what the request committed, not its Session."""
    client = webtest.TestApp(
        SessionMiddleware(write_note(postgres_registry, "request"), postgres_registry)
    )
    with session_scope(postgres_registry) as scope:
        session = postgres_registry()
        client.post("/")
        assert current_scope() is scope
        assert postgres_registry() is session
        assert session.scalars(text("SELECT text FROM note")).all() == ["request"]


def test_the_same_environ_again_is_a_new_request(
    sqlite_database: Database, sqlite_registry: scoped_session[Session]
) -> None:
    """As a middleware outside does it that tries again: the scope before it is over."""
    scopes: list[Scope] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        scopes.append(current_scope())
        return write_note(sqlite_registry, f"{len(scopes)}")(environ, start_response)

    wrapped = SessionMiddleware(app, sqlite_registry)
    environ = make_environ()

    for _ in range(2):
        Server().run(wrapped, environ)

    assert scopes[0] is not scopes[1]
    assert environ["wsgi_dbsession.scope"] is scopes[1]
    assert sqlite_database.notes() == ["1", "2"]
