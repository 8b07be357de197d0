"""What a newcomer gets wrong is told in words that lead on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import create_engine, select, text
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from werkzeug.middleware.proxy_fix import ProxyFix

from tests.support.models import Database, Note, make_engine
from tests.support.wsgi import (
    BODIES,
    Program,
    Server,
    assert_nothing_left,
    make_environ,
    make_registry,
)
from wsgi_dbsession import (
    NoScopeError,
    Observer,
    SessionMiddleware,
    current_scope,
    observe,
    session_scope,
)
from wsgi_dbsession.retry import RetryMiddleware

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from _typeshed.wsgi import WSGIApplication

    Registry = scoped_session[Session]
    Wrap = Callable[[WSGIApplication, Registry], WSGIApplication]

FIX = "scoped_session(sessionmaker(engine), scopefunc=current_scope)"

# -- wrapping -------------------------------------------------------------------------------------


@pytest.mark.promise("constructors")
@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(SessionMiddleware, id="alone"),
        pytest.param(lambda app, s: RetryMiddleware(SessionMiddleware(app, s)), id="with retries"),
        pytest.param(lambda app, s: ProxyFix(SessionMiddleware(app, s)), id="with another one"),
    ],
)
def test_an_application_that_would_wrap_itself(sqlite_registry: Registry, wrap: Wrap) -> None:
    """``app.wsgi_app = SessionMiddleware(app, Session)`` is no RecursionError."""
    app = Flask("app")
    app.wsgi_app = wrap(app, sqlite_registry)  # type: ignore[assignment, method-assign]

    with pytest.raises(RuntimeError, match=r"must wrap app\.wsgi_app, not app, .*Write `app\.w"):
        app.test_client().get("/")

    assert_nothing_left(sqlite_registry)


@pytest.mark.promise("nested middleware")
def test_an_application_in_two_middlewares_is_not_refused(
    sqlite_database: Database, sqlite_registry: Registry
) -> None:
    """Also an inner one that is given a Flask application, which is wrapped itself."""
    app = Flask("app")

    @app.get("/")
    def index() -> str:
        sqlite_registry.add(Note(text="a"))
        return ""

    app.wsgi_app = ProxyFix(app.wsgi_app)  # type: ignore[method-assign]
    inner = SessionMiddleware(app, sqlite_registry)
    wrapped = SessionMiddleware(inner, sqlite_registry)

    Server().run(wrapped, make_environ())

    assert sqlite_database.notes() == ["a"]


# -- arguments ------------------------------------------------------------------------------------


def hello() -> WSGIApplication:
    return BODIES["list body"](Program())


@pytest.mark.promise("constructors")
@pytest.mark.parametrize("sequence", [list, tuple, set])
def test_the_registries_in_a_list(
    sqlite_registry: Registry, sequence: Callable[[Any], Any]
) -> None:
    """Each is an argument; the fix says so."""
    given = sequence([sqlite_registry])
    uses: list[Callable[[], object]] = [
        lambda: SessionMiddleware(hello(), given),
        lambda: session_scope(given),
        lambda: observe(given, Observer()),
    ]
    for use in uses:
        with pytest.raises(TypeError, match=r"must be a scoped_session, got .* \*registries\)"):
            use()


@pytest.mark.promise("constructors")
def test_swapped_arguments(sqlite_registry: Registry) -> None:
    """The application comes first: a scoped_session is callable, too."""
    with pytest.raises(TypeError, match=r"app must be .* Write `SessionMiddleware\(app, Session"):
        SessionMiddleware(sqlite_registry, hello())  # type: ignore[arg-type]


@pytest.mark.promise("constructors")
def test_an_argument_that_is_none_of_this(sqlite_registry: Registry) -> None:
    """A model, an engine, the factory, None: the message shows what there must be."""
    given: list[Any] = [sessionmaker(), create_engine("sqlite://"), Note, None, Flask("app")]
    for each in given:
        with pytest.raises(TypeError, match=r"must be a scoped_session, got ") as caught:
            SessionMiddleware(hello(), sqlite_registry, each)
        assert FIX in str(caught.value)


@pytest.mark.promise("constructors")
def test_the_session_of_flask_sqlalchemy() -> None:
    """The message has the lines of the moving guide, and they work."""
    app = Flask("app")
    app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"
    db = SQLAlchemy()
    given: Any = db
    with pytest.raises(TypeError, match=r"`SessionMiddleware\(app, db\.session\)`"):
        SessionMiddleware(app.wsgi_app, given)
    with pytest.raises(ValueError, match=r"must be current_scope, got ") as caught:
        SessionMiddleware(app.wsgi_app, db.session)
    make, leave_out = "SQLAlchemy(session_options={'scopefunc': current_scope})", "funcs.pop()"
    assert make in str(caught.value)
    assert leave_out in str(caught.value)

    db = SQLAlchemy(session_options={"scopefunc": current_scope})
    db.init_app(app)
    app.teardown_appcontext_funcs.pop()
    app.wsgi_app = SessionMiddleware(app.wsgi_app, db.session)  # type: ignore[method-assign]

    @app.post("/")
    def write() -> tuple[str, int]:
        db.session.execute(text("CREATE TABLE note (text TEXT)"))
        db.session.execute(text("INSERT INTO note VALUES ('kept')"))
        return "", 201

    assert app.test_client().post("/").status_code == 201
    with app.app_context():
        with session_scope(db.session):
            assert db.session.scalars(text("SELECT text FROM note")).all() == ["kept"]
        db.engine.dispose()


# -- outside of a scope ---------------------------------------------------------------------------


@pytest.mark.promise("no scope")
@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda session: session(), id="called"),
        pytest.param(lambda session: session.add(Note()), id="add"),
        pytest.param(lambda session: session.scalars(select(Note)), id="scalars"),
        pytest.param(lambda session: session.commit(), id="commit"),
        pytest.param(lambda session: session.new, id="an attribute"),
        pytest.param(lambda session: Note() in session, id="in"),
        pytest.param(lambda session: session.registry.set(Session()), id="set"),
    ],
)
@pytest.mark.parametrize("adopted", [True, False])
def test_a_session_in_a_test_or_script(
    sqlite_database: Database, use: Callable[[Any], object], adopted: bool
) -> None:
    """Whatever asks for one is told to open a block."""
    registry = make_registry(sqlite_database.engine)
    if adopted:
        SessionMiddleware(hello(), registry)

    with pytest.raises(NoScopeError, match=r"a test, .*open a block: `with session_scope\(Sess"):
        use(registry)


@pytest.mark.promise("no scope")
def test_what_needs_no_session_works_outside_of_a_scope(
    sqlite_database: Database, tmp_path: Path
) -> None:
    """A teardown that removes, and a factory that binds later, once the registry is adopted."""
    registry = make_registry(None)
    SessionMiddleware(hello(), registry)

    registry.remove()
    registry.configure(bind=sqlite_database.engine)
    assert not registry.registry.has()
    registry.registry.clear()

    with session_scope(registry):
        registry.add(Note(text="a"))
        assert registry.registry.has()
    registry.remove()
    assert sqlite_database.notes() == ["a"]


@pytest.mark.promise("no scope")
def test_a_registry_that_is_not_adopted_yet_is_configured_by_its_factory(
    sqlite_database: Database,
) -> None:
    """SQLAlchemy's own registry asks for the scope first; the error is there to be read."""
    registry = make_registry(None)
    uses: list[Callable[[], object]] = [
        registry.remove,
        lambda: registry.configure(bind=sqlite_database.engine),
        registry.registry.has,
    ]
    for use in uses:
        with pytest.raises(NoScopeError):
            use()

    registry.session_factory.configure(bind=sqlite_database.engine)
    with session_scope(registry):
        registry.add(Note(text="a"))
    assert sqlite_database.notes() == ["a"]


# -- a registry that is not adopted ---------------------------------------------------------------


@pytest.mark.promise("no silent loss", "constructors")
def test_a_registry_that_was_not_passed_is_refused_at_its_first_use(
    sqlite_database: Database, sqlite_registry: Registry, tmp_path: Path
) -> None:
    """Its Sessions would have no owner: no commit, and one more connection with each request."""
    engine = make_engine(f"sqlite:///{tmp_path / 'other.db'}")
    forgotten = make_registry(engine)

    def early() -> None:
        sqlite_registry.add(Note(text="a"))
        forgotten.add(Note(text="lost"))

    app = SessionMiddleware(BODIES["list body"](Program(early)), sqlite_registry)
    for _ in range(20):
        with pytest.raises(TypeError, match=r"a scope must not be a dictionary key.*pass the sco"):
            Server().run(app, make_environ())

    assert sqlite_database.notes() == []
    assert_nothing_left(sqlite_registry, forgotten)


@pytest.mark.promise("constructors")
def test_a_session_that_was_set_is_closed_by_the_next(sqlite_database: Database) -> None:
    """registry.set(), which ``Session(**options)`` uses: one Session at a time, in a scope."""
    registry = make_registry(sqlite_database.engine)
    with session_scope(registry) as scope:
        first = registry(autoflush=False)
        assert list(scope.sessions.values()) == [first]
        second = registry.session_factory()
        registry.registry.set(second)
        assert registry() is second
        assert current_scope().sessions == {registry.registry: second}
        second.add(Note(text="a"))

    assert sqlite_database.notes() == ["a"]
    assert_nothing_left(registry)
