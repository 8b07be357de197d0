"""A process that forks: ``python -m tests.core.forking URL FORK SCENE...`` says what it saw.

A process of its own, because the test runner has threads, with which a fork is a risk.
"""

from __future__ import annotations

import ctypes
import gc
import json
import linecache
import multiprocessing
import os
import sys
import threading
import time
import traceback
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine, text
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from tests.support.models import Base, Note, make_engine
from tests.support.wsgi import Server, make_environ, make_registry
from wsgi_dbsession import (
    NoScopeError,
    SessionMiddleware,
    _fork,
    current_scope,
    find_scope,
    session_scope,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextvars import Context

    from _typeshed.wsgi import StartResponse, WSGIEnvironment

    Registry = scoped_session[Session]


def fork_in_c() -> int:
    """Fork as uWSGI does: Python's handlers are not called."""
    pid: int = ctypes.PyDLL(None).fork()
    return pid


def run_in_child(fork: str, work: Callable[[], object]) -> Any:
    """Do something in a child, and return its result or the text of its error."""
    reader, writer = os.pipe()

    def report() -> None:
        try:
            result = work()
        except BaseException:
            result = traceback.format_exc()
        os.write(writer, json.dumps(result).encode())

    if fork == "multiprocessing":
        process = multiprocessing.get_context("fork").Process(target=report)
        process.start()
        process.join()
    else:
        pid = os.fork() if fork == "os.fork" else fork_in_c()
        if pid == 0:
            report()
            os._exit(0)
        os.waitpid(pid, 0)
    os.close(writer)
    with open(reader, encoding="utf-8") as result:
        return json.load(result)


def backend(registry: Registry) -> int:
    """Return the process of PostgreSQL that serves the Session, and leave a row."""
    registry.add(Note(text="a"))
    registry.flush()
    pid: int = registry.scalar(text("SELECT pg_backend_pid()"))
    return pid


def backend_of_a_block(registry: Registry) -> int:
    """Return the same, of a unit of work of its own."""
    with session_scope(registry):
        return backend(registry)


def backend_of_a_request(registry: Registry) -> int:
    """Return the same, of a request."""
    pids: list[int] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        pids.append(backend(registry))
        start_response("200 OK", [])
        return []

    Server().run(SessionMiddleware(app, registry), make_environ())
    return pids[0]


def share_nothing(fork: str, registry: Registry) -> object:
    """Use the database in parent, child, grandchild, and in the parent again."""

    def work() -> list[int]:
        child = [backend_of_a_block(registry), backend_of_a_request(registry)]
        return [*child, run_in_child(fork, lambda: backend_of_a_block(registry))]

    before = backend_of_a_block(registry)
    return [before, *run_in_child(fork, work), backend_of_a_request(registry)]


class TenantSession(Session):
    """Finds its engine itself, as it is done for one schema per tenant."""

    def get_bind(self, *_: Any, **__: Any) -> Engine:
        """Return an engine that lives no longer than the Session."""
        found: Engine | None = self.info.get("tenant's")
        if found is None:
            found = self.info["engine"].execution_options(schema_translate_map={None: None})
            found = found.execution_options(tenant="a")
            self.info["tenant's"] = found
        return found


def share_nothing_by_binds(fork: str, registry: Registry) -> object:
    """Do it with an engine that is bound to a class only."""
    engine = registry.session_factory.kw["bind"]
    return share_nothing(
        fork,
        scoped_session(
            sessionmaker(binds={Base: engine}, class_=BoundByClass), scopefunc=current_scope
        ),
    )


class BoundByClass(Session):
    """Has textual SQL go where the mapped classes are."""

    def get_bind(self, mapper: Any = None, **more: Any) -> Any:
        """Find the engine of the class."""
        return super().get_bind(mapper or Note, **more)


def share_nothing_by_session(fork: str, registry: Registry) -> object:
    """Do it with an engine that only the Session knows."""
    engine = registry.session_factory.kw["bind"]
    factory: sessionmaker[Any] = sessionmaker(class_=TenantSession, info={"engine": engine})
    return share_nothing(fork, scoped_session(factory, scopefunc=current_scope))


def share_nothing_by_commit(fork: str, registry: Registry) -> object:
    """Do it where the application commits by itself, and the scope has nothing left to do."""
    engine = registry.session_factory.kw["bind"]
    factory: sessionmaker[Any] = sessionmaker(class_=TenantSession, info={"engine": engine})
    own = scoped_session(factory, scopefunc=current_scope)

    def work() -> int:
        with session_scope(own):
            pid = backend(own)
            own.commit()
        return pid

    return [work(), run_in_child(fork, work), work()]


def in_a_request(fork: str, registry: Registry) -> object:
    """Fork in the midst of a request, with its transaction open."""
    seen: list[object] = []

    copied: list[Context] = []

    def work() -> object:
        try:
            current_scope()
        except NoScopeError:
            # What was copied before, for a thread, is of the parent's request, too.
            if copied[0].run(find_scope) is None:
                return ["no scope", backend_of_a_block(registry), backend_of_a_request(registry)]
        return ["a scope"]

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        copied.append(copy_context())
        seen.append(backend(registry))
        start_response("200 OK", [])
        seen.extend(run_in_child(fork, work))
        yield b"one"
        seen.extend(run_in_child(fork, work))
        seen.append(backend(registry))

    Server().run(SessionMiddleware(app, registry), make_environ())
    return seen


def unwinding(fork: str, registry: Registry) -> object:
    """Let a child end by leaving the request and the blocks that it was forked in."""
    seen: list[object] = []
    for how in ("sys.exit", "return"):
        for around in ("request", "block"):
            seen.append(unwind(registry, how=how, around=around))
    return seen


def unwind(registry: Registry, *, how: str, around: str) -> object:
    """Fork in a request or a block, and have the child leave it; return what the parent has."""
    pid = -1
    seen: list[int] = []

    def fork_and_leave() -> None:
        nonlocal pid
        seen.append(backend(registry))
        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)
            seen.append(backend(registry))
        elif how == "sys.exit":
            sys.exit()

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        fork_and_leave()
        start_response("200 OK", [])
        return []

    try:
        if around == "block":
            with session_scope(registry):
                fork_and_leave()
        else:
            Server().run(SessionMiddleware(app, registry), make_environ())
    except SystemExit:
        pass
    if pid == 0:
        gc.collect()
        os._exit(0)
    return seen


def abandoned(fork: str, registry: Registry) -> object:
    """Let a child drop a response that its parent goes on with."""
    seen: list[int] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [])
        seen.append(backend(registry))
        yield b"one"
        seen.append(backend(registry))

    responses = [iter(SessionMiddleware(app, registry)(make_environ(), Server().start_response))]
    next(responses[0])

    def drop() -> str:
        responses.clear()
        gc.collect()
        return "dropped"

    result = run_in_child(fork, drop)
    list(responses[0])
    responses[0].close()  # type: ignore[attr-defined]
    return [result, *seen]


def detached(fork: str, registry: Registry) -> object:
    """Fork while a Session has connections that are gone or belong to no pool."""
    with session_scope(registry):
        registry.connection().detach()
        with_detached = run_in_child(fork, lambda: backend_of_a_block(registry))
    with session_scope(registry) as scope:
        registry.connection().invalidate()
        with_invalid = run_in_child(fork, lambda: backend_of_a_block(registry))
        scope.doom()
    with session_scope(registry):
        backend(registry)
        registry.commit()
        with_none = run_in_child(fork, lambda: backend_of_a_block(registry))
    return [type(each).__name__ for each in (with_detached, with_invalid, with_none)]


def two_threads(fork: str, registry: Registry) -> object:
    """Have a second thread of the child begin its work while the first forgets its parent's."""
    pids: list[int] = []
    thread = threading.Thread(target=lambda: pids.append(backend_of_a_block(registry)))

    forget: Callable[[object], None] = _fork._forget

    def begin(record: object) -> None:
        if not thread.ident:
            thread.start()
            wait_for_lock(thread)
        forget(record)

    def work() -> list[int]:
        pids.append(backend_of_a_block(registry))
        thread.join()
        return pids

    before = backend_of_a_block(registry)
    _fork._forget = begin
    return [before, *run_in_child(fork, work)]


def wait_for_lock(thread: threading.Thread) -> None:
    """Wait until the thread waits for a lock of the package."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        frame = sys._current_frames().get(thread.ident or 0)
        if frame is not None:
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
            if "with _lock" in line:
                return
        time.sleep(0.001)
    raise AssertionError("the thread does not wait")


SCENES: dict[str, Callable[[str, Registry], object]] = {
    each.__name__: each
    for each in (
        share_nothing,
        share_nothing_by_binds,
        share_nothing_by_session,
        share_nothing_by_commit,
        in_a_request,
        unwinding,
        abandoned,
        detached,
        two_threads,
    )
}


def main(url: str, fork: str, *names: str) -> None:
    """Print as JSON what the scenes return, and how many rows each has left.

    At the end of each, the parent leaves a row, too.
    """
    seen: dict[str, object] = {}
    for name in names:
        engine = make_engine(url)
        registry = make_registry(engine)
        result = SCENES[name](fork, registry)
        backend_of_a_block(registry)
        with engine.begin() as connection:
            rows = connection.execute(text("DELETE FROM note")).rowcount
        engine.dispose()
        seen[name] = [result, rows]
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
