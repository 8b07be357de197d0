"""Observers see each scope come and go, and touch nothing."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.exc import IntegrityError

from tests.support.errors import AppError, Kill
from tests.support.models import Book, Database, Note
from tests.support.wsgi import (
    BODIES,
    Program,
    Server,
    assert_nothing_left,
    make_environ,
    make_registry,
)
from wsgi_dbsession import (
    Observer,
    Scope,
    SessionMiddleware,
    current_scope,
    find_scope,
    observe,
    session_scope,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from sqlalchemy.orm import Session, scoped_session

    Registry = scoped_session[Session]

pytestmark = pytest.mark.promise("observers")


class Diary(Observer):
    """Writes down each call, with what the scope says then."""

    def __init__(self, lines: list[str] | None = None, name: str = "") -> None:
        self.lines = [] if lines is None else lines
        self.name = name
        self.scopes: list[Scope] = []

    def _write(self, scope: Scope, line: str) -> None:
        self.lines.append(self.name + line)
        self.scopes.append(scope)

    def opened(self, scope: Scope) -> None:
        self._write(scope, f"opened {scope.name}, {len(scope.sessions)} Sessions")

    def settled(self, scope: Scope) -> None:
        failure = type(scope.failure).__name__
        self._write(scope, f"settled {scope.outcome}, {scope.reason}, {failure}")

    def hook_called(self, scope: Scope, hook: Callable[..., object]) -> None:
        self._write(scope, f"hook {hook.__name__} {scope.outcome}")

    def commit_failed(self, scope: Scope, failure: BaseException) -> bool | None:
        assert scope.failure is failure
        self._write(scope, f"commit failed {scope.outcome}, {scope.reason}")
        return None

    def closed(self, scope: Scope) -> None:
        self._write(scope, f"closed {scope.outcome}, {len(scope.sessions)} Sessions")


def notify() -> None:
    """Be a hook."""


def add_note(registry: Registry) -> Callable[[], None]:
    def early() -> None:
        current_scope().on_commit(notify)
        registry.add(Note(text="a"))

    return early


def serve(registry: Registry, early: Callable[[], object], *observers: Observer) -> None:
    """Answer one POST to /notes."""
    app = BODIES["list body"](Program(early))
    wrapped = SessionMiddleware(app, registry, observers=observers)
    Server().run(wrapped, make_environ("POST", "/notes"))


# -- what they see --------------------------------------------------------------------------------


def test_an_observer_that_does_nothing_does_nothing(
    sqlite_database: Database, sqlite_registry: Registry
) -> None:
    """Every method of the base class is there, and a request with it is like one without."""
    serve(sqlite_registry, add_note(sqlite_registry), Observer())
    with pytest.raises(IntegrityError):
        serve(sqlite_registry, lambda: sqlite_registry.add(Book(author_id=7)), Observer())

    assert sqlite_database.notes() == ["a"]


def test_the_life_of_a_request(sqlite_database: Database, sqlite_registry: Registry) -> None:
    """Opened before the application, hooks after the commit, closed without Sessions."""
    diary = Diary()

    serve(sqlite_registry, add_note(sqlite_registry), diary)

    assert diary.lines == [
        "opened POST /notes, 0 Sessions",
        "hook notify commit",
        "settled commit, complete, NoneType",
        "closed commit, 0 Sessions",
    ]
    assert len({id(scope) for scope in diary.scopes}) == 1
    assert sqlite_database.notes() == ["a"]


def test_the_life_of_a_block(sqlite_registry: Registry) -> None:
    """It has the name that it was given, and its observers by observe()."""
    with observe(sqlite_registry, Diary()) as diary, session_scope(sqlite_registry, name="job"):
        add_note(sqlite_registry)()

    assert isinstance(diary, Diary)
    assert diary.lines == [
        "opened job, 0 Sessions",
        "hook notify commit",
        "settled commit, complete, NoneType",
        "closed commit, 0 Sessions",
    ]


def test_a_failed_commit(
    sqlite_registry: Registry,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is told before the hooks for the rollback, and logged if none has dealt with it."""
    diary = Diary()

    def early() -> None:
        current_scope().on_rollback(notify)
        sqlite_registry.add(Book(author_id=7))

    with pytest.raises(IntegrityError):
        serve(sqlite_registry, early, diary)

    assert diary.lines == [
        "opened POST /notes, 0 Sessions",
        "commit failed rollback, rolled back",
        "hook notify rollback",
        "settled rollback, rolled back, IntegrityError",
        "closed rollback, 0 Sessions",
    ]
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


@pytest.mark.parametrize("position", [0, 1])
def test_a_failed_commit_that_was_dealt_with_is_not_logged(
    sqlite_registry: Registry, caplog: pytest.LogCaptureFixture, position: int
) -> None:
    """One observer is enough, the others are told all the same; the error propagates."""

    class Dealing(Diary):
        def commit_failed(self, scope: Scope, failure: BaseException) -> bool:
            super().commit_failed(scope, failure)
            return True

    observers = [Diary(), Diary()]
    observers[position] = Dealing()

    with pytest.raises(IntegrityError):
        serve(sqlite_registry, lambda: sqlite_registry.add(Book(author_id=7)), *observers)

    assert caplog.records == []
    for diary in observers:
        assert "commit failed rollback, rolled back" in diary.lines


def test_something_true_is_not_true(
    sqlite_registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    """A method that happens to return something, as a lambda does, silences no log."""

    class Chatty(Observer):
        def commit_failed(self, scope: Scope, failure: BaseException) -> Any:
            return "noted"

    with pytest.raises(IntegrityError):
        serve(sqlite_registry, lambda: sqlite_registry.add(Book(author_id=7)), Chatty())

    assert len(caplog.records) == 1


def test_each_outcome_of_a_stream_is_seen(
    sqlite_database: Database, sqlite_registry: Registry
) -> None:
    """With "headers", that of the part before the start, and that of the rest."""
    diary = Diary()
    program = Program(
        early=lambda: sqlite_registry.add(Note(text="early")),
        late=lambda: sqlite_registry.add(Note(text="late")),
    )
    app = SessionMiddleware(
        BODIES["unsized generator"](program),
        sqlite_registry,
        commit_on="headers",
        observers=[diary],
    )

    Server().run(app, make_environ())

    assert diary.lines == [
        "opened GET /, 0 Sessions",
        "settled commit, complete, NoneType",
        "settled commit, complete, NoneType",
        "closed commit, 0 Sessions",
    ]


def test_a_request_without_work_has_no_outcome(sqlite_registry: Registry) -> None:
    """It is opened and closed."""
    diary = Diary()

    serve(sqlite_registry, lambda: None, diary)

    assert diary.lines == ["opened POST /notes, 0 Sessions", "closed None, 0 Sessions"]


@pytest.mark.parametrize("body", ["list body", "unsized generator"])
@pytest.mark.parametrize("error", [AppError, Kill])
def test_an_error_of_the_application(
    sqlite_registry: Registry, body: str, error: type[BaseException]
) -> None:
    """One outcome, one end, wherever it was raised."""
    diary = Diary()

    def fail() -> None:
        sqlite_registry.add(Note(text="a"))
        raise error

    app = BODIES[body](Program(late=fail))
    with pytest.raises(error):
        Server().run(SessionMiddleware(app, sqlite_registry, observers=[diary]), make_environ())

    assert diary.lines == [
        "opened GET /, 0 Sessions",
        "settled rollback, error, NoneType",
        "closed rollback, 0 Sessions",
    ]


def test_a_dropped_response_is_not_told(sqlite_registry: Registry) -> None:
    """A finalizer runs no code but the closing of the Sessions."""
    diary = Diary()
    program = Program(early=add_note(sqlite_registry))
    app = SessionMiddleware(
        BODIES["unsized generator"](program), sqlite_registry, observers=[diary]
    )

    with pytest.warns(ResourceWarning):
        app(make_environ(), Server().start_response)

    assert diary.lines == ["opened GET /, 0 Sessions"]
    assert_nothing_left(sqlite_registry)


# -- who looks on ---------------------------------------------------------------------------------


def test_observers_are_told_once_in_order(sqlite_registry: Registry) -> None:
    """Those of the middleware first, then those of the registry; given twice, one counts."""
    lines: list[str] = []
    first, second = Diary(lines, "1 "), Diary(lines, "2 ")

    with observe(sqlite_registry, second), observe(sqlite_registry, first):
        serve(sqlite_registry, lambda: None, first, first)

    assert [line.split(",")[0] for line in lines] == [
        "1 opened POST /notes",
        "2 opened POST /notes",
        "1 closed None",
        "2 closed None",
    ]


def test_observing_ends_with_its_block(sqlite_registry: Registry) -> None:
    """Only what was registered by it; a scope that is open keeps those that it has."""
    diary = Diary()
    other = Diary()
    observe(sqlite_registry, other)
    observing = observe(sqlite_registry, diary)

    with observing, session_scope(sqlite_registry):
        pass
    with session_scope(sqlite_registry):
        pass

    assert len(diary.lines) == 2
    assert len(other.lines) == 4


def test_observing_twice_counts_twice(sqlite_registry: Registry) -> None:
    """The inner block's end does not take the outer one's observer away."""
    diary = Diary()
    with observe(sqlite_registry, diary):
        with observe(sqlite_registry, diary), session_scope(sqlite_registry):
            pass
        assert len(diary.lines) == 2
        with session_scope(sqlite_registry):
            pass

    assert len(diary.lines) == 4


def test_only_scopes_that_were_given_the_registry_are_seen(
    sqlite_database: Database, sqlite_registry: Registry
) -> None:
    """One that uses it without having been given it is not told."""
    other = make_registry(sqlite_database.engine)
    with observe(other, Diary()) as diary:
        with session_scope(sqlite_registry):
            other.add(Note(text="a"))
        with session_scope(sqlite_registry, other):
            pass

    assert isinstance(diary, Diary)
    assert len(diary.lines) == 2
    assert sqlite_database.notes() == ["a"]


def test_a_nested_middleware_adds_its_observers(
    sqlite_database: Database, sqlite_registry: Registry
) -> None:
    """They are opened where it is called, and see the outcome of the whole."""
    lines: list[str] = []
    outer, inner, both = Diary(lines, "outer "), Diary(lines, "inner "), Diary(lines, "both ")
    other = make_registry(sqlite_database.engine)
    app = SessionMiddleware(
        BODIES["list body"](Program(add_note(sqlite_registry))), other, observers=[inner, both]
    )

    def between(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        lines.append("between")
        return app(environ, start_response)

    wrapped = SessionMiddleware(between, sqlite_registry, observers=[outer, both])
    with observe(other, both):
        Server().run(wrapped, make_environ())

    assert [line.split(",")[0] for line in lines] == [
        "outer opened GET /",
        "both opened GET /",
        "between",
        "inner opened GET /",
        *(f"{each} hook notify commit" for each in ("outer", "both", "inner")),
        *(f"{each} settled commit" for each in ("outer", "both", "inner")),
        *(f"{each} closed commit" for each in ("outer", "both", "inner")),
    ]


def test_a_wrapper_adds_itself_when_it_is_built(sqlite_registry: Registry) -> None:
    """The middleware's attribute is for extras that step in around it."""
    diary = Diary()
    app = SessionMiddleware(BODIES["list body"](Program()), sqlite_registry)
    app.observers += (diary,)

    Server().run(app, make_environ())

    assert len(diary.lines) == 2


@pytest.mark.parametrize("dealt_with", [False, True, None])
def test_discarded_changes_are_logged_unless_dealt_with(
    sqlite_registry: Registry, caplog: pytest.LogCaptureFixture, dealt_with: bool | None
) -> None:
    """An observer learns the status, before the outcome."""
    caplog.set_level(logging.INFO)
    seen: list[tuple[object, str]] = []

    class Dealer(Observer):
        def discarding(self, scope: Scope, cause: str) -> bool | None:
            seen.append((scope.outcome, cause))
            return dealt_with

    app = BODIES["list body"](Program(add_note(sqlite_registry), status="404 Not Found"))
    wrapped = SessionMiddleware(app, sqlite_registry, observers=[Dealer()])
    Server().run(wrapped, make_environ("POST"))

    assert seen == [(None, "status 404")]
    assert len(caplog.records) == (0 if dealt_with else 1)


# -- what they cannot do --------------------------------------------------------------------------


METHODS = ["opened", "settled", "hook_called", "commit_failed", "closed"]


@pytest.mark.parametrize("method", METHODS)
def test_an_observer_that_raises_touches_nothing(
    sqlite_database: Database,
    sqlite_registry: Registry,
    caplog: pytest.LogCaptureFixture,
    method: str,
) -> None:
    """The others are told, the outcome stays, and the log has the traceback."""
    fails = method == "commit_failed"

    def raising(self: Observer, *_: object) -> None:
        raise AppError

    broken = type("Broken", (Observer,), {method: raising})()
    diary = Diary()

    def early() -> None:
        add_note(sqlite_registry)()
        if fails:
            sqlite_registry.add(Book(author_id=7))

    if fails:
        with pytest.raises(IntegrityError):
            serve(sqlite_registry, early, broken, diary)
    else:
        serve(sqlite_registry, early, broken, diary)

    assert sqlite_database.notes() == ([] if fails else ["a"])
    assert len(diary.lines) == 4
    record = caplog.records[0]
    assert (record.name, record.levelno) == ("wsgi_dbsession", logging.ERROR)
    assert record.getMessage() == f"observer failed in {method}(): {broken!r}"
    assert record.exc_info is not None
    assert record.exc_info[0] is AppError
    assert len(caplog.records) == 1 + fails


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["a request", "a block"])
def test_an_interruption_in_an_observer_leaves_nothing(
    sqlite_registry: Registry, method: str, how: str
) -> None:
    """It propagates, as from anywhere else, and scope and connection are gone."""

    def raising(self: Observer, *_: object) -> None:
        raise Kill

    broken = type("Broken", (Observer,), {method: raising})()

    def early() -> None:
        add_note(sqlite_registry)()
        if method == "commit_failed":
            sqlite_registry.add(Book(author_id=7))

    with pytest.raises(Kill):
        if how == "a request":
            serve(sqlite_registry, early, broken)
        else:
            with observe(sqlite_registry, broken), session_scope(sqlite_registry):
                early()

    assert_nothing_left(sqlite_registry)


def test_what_is_no_observer_is_refused(sqlite_registry: Registry) -> None:
    """The message names the fix: a class of one's own that has the methods is not enough."""

    class Duck:
        def settled(self, scope: Scope) -> None:
            pass

    duck: Any = Duck()
    app = BODIES["list body"](Program())
    for build in (
        lambda: observe(sqlite_registry, duck),
        lambda: observe(sqlite_registry, Observer),  # type: ignore[arg-type]
        lambda: SessionMiddleware(app, sqlite_registry, observers=[duck]),
    ):
        with pytest.raises(TypeError, match=r"an observer must be .*Derive its class"):
            build()


# -- find_scope -----------------------------------------------------------------------------------


def test_the_scope_is_found_where_there_is_one(sqlite_registry: Registry) -> None:
    """For listeners that run inside and outside of scopes: None, and no error."""
    assert find_scope() is None
    with session_scope(sqlite_registry) as outer:
        assert find_scope() is outer
        assert outer.outer is None
        with session_scope(sqlite_registry) as inner:
            assert find_scope() is inner
            assert inner.outer is outer
        assert find_scope() is outer
    assert find_scope() is None


def test_the_methods_of_a_base_class_are_called(sqlite_registry: Registry) -> None:
    """It may be one that is no Observer, and a class in between may have others."""
    heard: list[str] = []

    class Closing:
        def closed(self, scope: Scope) -> None:
            heard.append("closed")

    class Opening(Observer):
        def opened(self, scope: Scope) -> None:
            heard.append("opened")

    class Both(Closing, Opening):
        pass

    with observe(sqlite_registry, Both()), session_scope(sqlite_registry):
        pass

    assert Both.overridden == {"opened", "closed"}
    assert heard == ["opened", "closed"]


def test_the_class_of_an_observer_may_take_options() -> None:
    """They are those of another base class."""

    class Named:
        name = ""

        def __init_subclass__(cls, *, name: str) -> None:
            cls.name = name

    class Both(Observer, Named, name="both"):
        pass

    assert Both.name == "both"
