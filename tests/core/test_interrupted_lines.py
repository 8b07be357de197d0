"""An interruption at any line of the package leaves no scope and no connection behind.

A signal's KeyboardInterrupt may come between any two lines, and an application's time-out under
gevent, which may be an ``Exception`` that somebody catches. So each scene below runs once per line
of the package that it executes, and is interrupted there.
"""

from __future__ import annotations

import contextvars
import gc
import linecache
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import event, text

import wsgi_dbsession
from tests.support.errors import AppError
from tests.support.models import Database, Note
from tests.support.moments import flush_note
from tests.support.wsgi import BODIES, Program, Server, make_environ, open_sessions
from wsgi_dbsession import (
    Observer,
    SessionMiddleware,
    current_scope,
    find_scope,
    session_scope,
)
from wsgi_dbsession._driver import READ_ONLY
from wsgi_dbsession._step import scopes

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from sqlalchemy.orm import Session, scoped_session

    Registry = scoped_session[Session]

PACKAGE = str(Path(wsgi_dbsession.__file__).parent)

# Nothing can be done in the first line of a method that ends something: it has not begun to. What
# such a block holds is closed when its context is dropped.
REMAINING = {"_block.py, __exit__: try:"}


# Like KeyboardInterrupt, and like `gevent.Timeout(seconds, AppError)`.
KINDS = [KeyboardInterrupt, pytest.param(AppError, marks=pytest.mark.long)]


class Interrupter:
    """Raises an error at one line of the package, counted as they are executed."""

    def __init__(self, number: int, kind: type[BaseException]) -> None:
        self.kind = kind
        self.left = number
        self.where = ""

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        return self.local if frame.f_code.co_filename.startswith(PACKAGE) else None

    def local(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                name, number = frame.f_code.co_filename, frame.f_lineno
                line = linecache.getline(name, number).strip()
                self.where = f"{Path(name).name}, {frame.f_code.co_name}: {line}"
                raise self.kind
        return self.local

    def run(self, scene: Callable[[], object]) -> bool:
        """Interrupt this scene, and return whether it came to its end."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            scene()
        except (KeyboardInterrupt, Exception):  # what it led to, too
            return False
        finally:
            sys.settrace(before)
        return True


def make_list(registry: Registry) -> Callable[[], object]:
    app = BODIES["list body"](Program(lambda: flush_note(registry, "a")))
    wrapped = SessionMiddleware(app, registry)
    return lambda: Server().run(wrapped, make_environ())


def make_generator(registry: Registry) -> Callable[[], object]:
    program = Program(lambda: flush_note(registry, "a"), lambda: flush_note(registry, "b"))
    app = BODIES["unsized generator"](program)
    wrapped = SessionMiddleware(app, registry, commit_on="headers")
    return lambda: Server().run(wrapped, make_environ())


def make_block(registry: Registry) -> Callable[[], object]:
    def scene() -> None:
        with session_scope(registry):
            flush_note(registry, "a")

    return scene


def make_block_in_generator(registry: Registry) -> Callable[[], object]:
    def late() -> None:
        with session_scope(registry):
            flush_note(registry, "a")

    wrapped = SessionMiddleware(BODIES["generator with a length"](Program(late=late)), registry)
    return lambda: Server().run(wrapped, make_environ())


def make_hook(registry: Registry) -> Callable[[], object]:
    def early() -> None:
        current_scope().on_commit(flush_note, registry, "b")
        flush_note(registry, "a")

    app = BODIES["write()"](Program(early))
    wrapped = SessionMiddleware(app, registry, observers=[Observer()])
    return lambda: Server().run(wrapped, make_environ())


def make_error(registry: Registry) -> Callable[[], object]:
    def early() -> None:
        flush_note(registry, "a")
        raise AppError

    wrapped = SessionMiddleware(BODIES["list body"](Program(early)), registry)
    return lambda: Server().run(wrapped, make_environ())


def make_released(registry: Registry) -> Callable[[], object]:
    def early() -> None:
        registry.scalar(text("SELECT 1"))
        with current_scope().released():
            pass
        flush_note(registry, "a")

    wrapped = SessionMiddleware(BODIES["list body"](Program(early)), registry)
    return lambda: Server().run(wrapped, make_environ())


def make_discard(registry: Registry) -> Callable[[], object]:
    def early() -> None:
        registry.execute(text("INSERT INTO note (text) VALUES ('a')"))
        registry.remove()

    wrapped = SessionMiddleware(BODIES["list body"](Program(early)), registry)

    return lambda: Server().run(wrapped, make_environ())


SCENES: dict[str, tuple[Callable[[Registry], Callable[[], object]], set[str]]] = {
    "a list": (make_list, set()),
    "a generator": (make_generator, set()),
    "a block": (make_block, REMAINING),
    "a block in a generator": (make_block_in_generator, REMAINING),
    "a hook": (make_hook, set()),
    "an error": (make_error, set()),
    "a released block": (make_released, set()),
    "a discard": (make_discard, set()),
}
# Each line is a request: these two have few, and the others look in the same way.
SHORT = ("a list", "a block")


@pytest.mark.promise("interrupted lines", "no false success")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name",
    [pytest.param(each, marks=[] if each in SHORT else pytest.mark.long) for each in SCENES],
)
def test_an_interruption_at_any_line_leaves_nothing(
    sqlite_database: Database,
    sqlite_registry: Registry,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    kind: type[BaseException],
) -> None:
    """The scope is not found, its Sessions hold nothing, and the next request is like any other.

    A scene that comes to its end all the same has committed.
    """
    make, remaining = SCENES[name]
    scene = make(sqlite_registry)
    pool: Any = sqlite_database.engine.pool
    unheard: list[object] = []  # a finalizer that was interrupted cannot raise
    monkeypatch.setattr(sys, "unraisablehook", unheard.append)
    saved = sqlite_database.notes
    # An earlier test may have made a RetryMiddleware, whose lines in the driver's rollback are not
    # the core's: what the driver does in there is not looked at either.
    monkeypatch.setattr(sqlite_database.engine.dialect, READ_ONLY, True, raising=False)
    # As extras do: what is left in the context must not lead them in a circle.
    event.listen(sqlite_registry, "after_soft_rollback", lambda *_: list(scopes()))

    def look(interrupter: Interrupter) -> tuple[bool, bool]:
        before = len(saved())
        ended = interrupter.run(scene)
        clean = find_scope() is None and not pool.checkedout()
        clean = clean and not open_sessions(sqlite_registry)
        assert not ended or len(saved()) > before
        if clean:
            before = len(saved())
            with session_scope(sqlite_registry) as scope:
                sqlite_registry.add(Note(text="next"))
            assert scope.outer is None or not scope.outer.in_step
            assert len(saved()) == before + 1
        return ended, clean

    left: set[str] = set()
    number = 0
    where = "the first line"
    gc.disable()
    try:
        while where:
            number += 1
            interrupter = Interrupter(number, kind)
            # Whatever is left in the context goes with it.
            _, clean = contextvars.Context().run(look, interrupter)
            where = interrupter.where
            if not clean:
                left.add(where)
                gc.collect()
                assert pool.checkedout() == 0, where
    finally:
        gc.enable()

    assert number > 100
    assert left <= remaining
    if sys.version_info < (3, 12):  # later ones do not stop at the line of a `try`
        assert left == remaining
