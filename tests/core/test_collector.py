"""A finalizer closes Sessions and nothing else, whenever the collector runs it."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import gc
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy
import typing_extensions
from sqlalchemy import text
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from tests.support.models import Database, Note
from tests.support.wsgi import BODIES, Program, Server, assert_nothing_left, make_environ
from wsgi_dbsession import (
    NoScopeError,
    Scope,
    SessionMiddleware,
    current_scope,
    find_scope,
    session_scope,
)

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    Registry = scoped_session[Session]

ROOT = Path(__file__).parents[2]

# -- collections within ContextVar.set() ----------------------------------------------------------

THIS = f"{sys.version_info.major}.{sys.version_info.minor}"
# On later ones a collection waits until no C code is running.
CRASHING = ("3.10", "3.11")
# The first ring of tests is run on each Python that is here.
VERSIONS = [
    pytest.param(each, marks=[] if each == THIS else pytest.mark.long)
    for each in sorted({THIS, *CRASHING})
]


@functools.cache
def find_python(version: str) -> str | None:
    """Return an interpreter of this version, the running one first."""
    if version == THIS:
        return sys.executable
    found = [
        shutil.which(f"python{version}"),
        *Path(os.environ.get("PYENV_ROOT", "~/.pyenv"))
        .expanduser()
        .glob(f"versions/{version}.*/bin/python"),
    ]
    for python in found:
        # What is found on the path may be a shim of a version that is not there.
        if (
            python is not None
            and not subprocess.run(
                [python, "-c", "import sqlite3"], capture_output=True, check=False
            ).returncode
        ):
            return str(python)
    return None


@pytest.fixture
def libraries(tmp_path: Path) -> Path:
    """A directory with SQLAlchemy alone: without its extensions, any interpreter can use it."""
    directory = tmp_path / "libraries"
    directory.mkdir()
    for module in (sqlalchemy, typing_extensions):
        path = Path(module.__file__ or "")
        path = path.parent if path.name == "__init__.py" else path
        (directory / path.name).symlink_to(path)
    return directory


def collect(version: str, scene: str, tmp_path: Path, libraries: Path) -> tuple[int, str, str]:
    """Run :mod:`tests.core.collecting`, with freed memory overwritten, so that a use crashes."""
    python = find_python(version)
    if python is None:
        pytest.skip(f"NOT TESTED: there is no Python {version} with sqlite3 on this machine")
    paths = [str(ROOT), str(libraries)]
    result = subprocess.run(
        [python, "-m", "tests.core.collecting", scene, f"sqlite:///{tmp_path / 'x.db'}"],
        capture_output=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONMALLOC": "debug", "PYTHONPATH": os.pathsep.join(paths)},
        text=True,
        timeout=150,
    )
    return result.returncode, result.stdout, result.stderr


@pytest.mark.promise("collector")
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("scene", ["response", "block", "block in a response"])
def test_a_collection_in_the_midst_of_a_context_variable_does_not_crash(
    tmp_path: Path, libraries: Path, version: str, scene: str
) -> None:
    """A dropped response in a cycle, and a generator that is collected inside of a block.

    Whichever allocation of a request the collection begins at, the request has its scope and
    commits, and no scope and no connection is left.
    """
    assert collect(version, scene, tmp_path, libraries) == (0, "well\n", "")


@pytest.mark.long
@pytest.mark.parametrize("version", CRASHING)
def test_the_interpreter_crashes_where_a_finalizer_sets_a_context_variable(
    tmp_path: Path, libraries: Path, version: str
) -> None:
    """Without this package: the tests above would notice."""
    code, output, _ = collect(version, "bare", tmp_path, libraries)

    assert (code < 0, output) == (True, "")


# -- the lookup heals -----------------------------------------------------------------------------


def hold_block(registry: Registry) -> Generator[Scope]:
    with session_scope(registry) as scope:
        registry.add(Note(text="lost"))
        registry.flush()
        yield scope


@pytest.mark.promise("collector")
def test_the_scope_is_found_past_a_block_that_was_collected(
    sqlite_database: Database, sqlite_registry: Registry
) -> None:
    """Whatever is active around it: nothing, a block, a request; and further blocks work."""
    hooked: list[bool] = []

    def abandon() -> Scope:
        generator = hold_block(sqlite_registry)
        scope = next(generator)
        assert find_scope() is scope
        return scope

    def early() -> None:
        scope = current_scope()
        assert abandon() is not scope
        assert current_scope() is scope
        scope.on_commit(lambda: hooked.append(current_scope() is scope))
        with session_scope(sqlite_registry) as inner:
            assert inner.outer is scope
            sqlite_registry.add(Note(text="block"))
        assert current_scope() is scope
        sqlite_registry.add(Note(text="request"))

    scope = abandon()
    assert (scope.outcome, scope.reason) == ("rollback", "error")
    assert find_scope() is None
    with session_scope(sqlite_registry) as outer:
        assert outer.outer is None
        abandon()
        assert current_scope() is outer
    for body in ("list body", "unsized generator"):
        app = SessionMiddleware(BODIES[body](Program(early)), sqlite_registry)
        Server().run(app, make_environ())
        assert find_scope() is None

    assert hooked == [True, True]
    assert sqlite_database.notes() == ["block", "block", "request", "request"]
    forget_the_last(sqlite_registry)
    assert_nothing_left(sqlite_registry)


@pytest.mark.promise("collector")
@pytest.mark.parametrize("where", ["outside", "in a block"])
def test_many_abandoned_blocks_leave_no_scope(sqlite_registry: Registry, where: str) -> None:
    """A job that breaks off the iteration over a generator, again and again."""

    def alive() -> int:
        gc.collect()
        return sum(type(each) is Scope for each in gc.get_objects())

    def work() -> None:
        for _ in range(200):
            for _ in hold_block(sqlite_registry):
                break

    before = alive()
    with session_scope(sqlite_registry) if where == "in a block" else contextlib.nullcontext():
        work()
        assert alive() <= before + 2

    # The last of them, and the block around it, until the context variable is set again.
    assert alive() <= before + (2 if where == "in a block" else 1)
    forget_the_last(sqlite_registry)


def forget_the_last(registry: Registry) -> None:
    with session_scope(registry):
        pass


# -- late work ------------------------------------------------------------------------------------


@pytest.mark.promise("threads")
@pytest.mark.parametrize("body", ["list body", "unsized generator"])
def test_a_session_that_is_made_too_late_is_refused_and_closed(
    sqlite_database: Database, sqlite_registry: Registry, body: str
) -> None:
    """Its constructor was waiting, in a copied context, while the step ended."""
    made: list[Session] = []
    inside, over = threading.Event(), threading.Event()
    errors: list[type[BaseException]] = []

    class SlowSession(Session):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)
            self.execute(text("SELECT 1"))  # it holds a connection already
            inside.set()
            assert over.wait(60)

    factory = sessionmaker(sqlite_database.engine, class_=SlowSession)
    registry: scoped_session[Any] = scoped_session(factory, scopefunc=current_scope)

    def late() -> None:
        try:
            registry.add(Note(text="late"))
        except NoScopeError as error:
            errors.append(type(error))

    threads: list[threading.Thread] = []

    def early() -> None:
        context = contextvars.copy_context()
        threads.append(thread := threading.Thread(target=context.run, args=[late]))
        thread.start()
        assert inside.wait(60)

    app = SessionMiddleware(BODIES[body](Program(early)), registry)
    environ = make_environ()
    Server().run(app, environ)
    scope = environ["wsgi_dbsession.scope"]
    over.set()
    threads[0].join(60)

    assert errors == [NoScopeError]
    assert len(made) == 1
    assert scope.sessions == {}
    assert_nothing_left(registry)


@pytest.mark.promise("threads")
def test_a_session_that_its_ending_scope_has_closed_is_refused(
    sqlite_registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scope ends between two lines of the thread that makes the Session, and has seen it."""

    class Ending(dict[Any, Any]):
        def __setitem__(self, registry: Any, session: Session) -> None:
            super().__setitem__(registry, session)
            scope.in_step = False
            assert scope.close_sessions() is None

    with session_scope(sqlite_registry) as scope:
        scope.sessions = Ending()
        with pytest.raises(NoScopeError):
            sqlite_registry.connection()

    assert_nothing_left(sqlite_registry)


@pytest.mark.promise("threads")
def test_a_session_that_is_made_between_two_steps_is_refused(
    sqlite_database: Database, sqlite_registry: Registry
) -> None:
    """The request goes on, and makes one of its own when it asks for it."""
    inside, between = threading.Event(), threading.Event()
    slow = [True]
    made: list[Session] = []

    class SlowSession(Session):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)
            if slow.pop() if slow else False:
                inside.set()
                assert between.wait(60)

    factory = sessionmaker(sqlite_database.engine, class_=SlowSession)
    registry: scoped_session[Any] = scoped_session(factory, scopefunc=current_scope)
    refused: list[bool] = []

    def work() -> None:
        with pytest.raises(NoScopeError):
            registry.add(Note(text="late"))
        refused.append(True)

    threads: list[threading.Thread] = []

    def early() -> None:
        context = contextvars.copy_context()
        threads.append(thread := threading.Thread(target=context.run, args=[work]))
        thread.start()
        assert inside.wait(60)

    program = Program(early, late=lambda: registry.add(Note(text="kept")))
    app = SessionMiddleware(BODIES["unsized generator"](program), registry)
    response: Any = app(make_environ(), Server().start_response)
    blocks: Iterator[bytes] = iter(response)
    assert next(blocks) == b"one"
    between.set()
    threads[0].join(60)
    assert list(blocks) == [b"two"]
    response.close()

    assert refused == [True]
    assert len(made) == 2
    assert sqlite_database.notes() == ["kept"]
    assert_nothing_left(registry)
