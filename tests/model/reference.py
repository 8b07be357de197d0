"""A model of the package: sections 4 and 5 of the design, without SQLAlchemy and without care.

It keeps rows in lists and the scopes in force on a stack, and has nothing to clean up. What it is
told to do is what the application in :mod:`tests.model.programs` does.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from tests.model.programs import (
    FINISHED,
    Application,
    Exchange,
    Hook,
    RegistryName,
    Statement,
)
from tests.model.unit import INVALID, ORPHAN, Connected, Refused, Setup, Transaction, Unit, veto
from wsgi_dbsession import NoScopeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

NOTHING = b"nothing"  # not even the end of the body, which is None


class Model:
    """What the database holds, and which scopes are in force."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.committed: dict[tuple[int, RegistryName], list[str]] = {}
        self.lanes = 0
        self.stack: list[Unit] = []
        self.units: list[Unit] = []
        self.hooks_run: list[str] = []
        self.log: list[str] = []
        self.lost: list[str] = []
        self.asked: list[Exchange] = []
        self.warned: set[RegistryName] = set()
        self.app: WSGIApplication = Reference(self)

    def rows(self, lane: int, registry: RegistryName) -> list[str]:
        return self.committed.setdefault((lane, registry), [])

    def sessions(self) -> int:
        return sum(len(unit.sessions) for unit in self.units)

    def connections(self) -> int:
        return sum(
            session.transaction is not None and session.transaction.connected
            for unit in self.units
            for session in unit.sessions.values()
        )

    def make_unit(self, environ: WSGIEnvironment | None = None) -> Unit:
        unit = Unit(self, environ)
        self.units.append(unit)
        return unit

    # What the application asks for.

    def exchange(self, environ: WSGIEnvironment) -> Exchange:
        return Exchange(self.app, environ)

    def begin_request(self, environ: WSGIEnvironment) -> None:
        pass

    def ask(self, environ: WSGIEnvironment) -> Exchange:
        self.asked.append(Exchange(self.app, environ))
        return self.asked[-1]

    def current(self) -> Unit:
        if not self.stack:
            raise NoScopeError
        return self.stack[-1]

    def say(self, what: Literal["doom", "keep"]) -> None:
        if what == "doom":
            self.current().doomed = True
        else:
            self.current().kept = True

    def hook(self, hook: Hook, label: str) -> None:
        self.current().hooks.append((hook, label))

    @contextmanager
    def block(self) -> Iterator[None]:
        unit, stack = self.make_unit(), self.stack
        stack.append(unit)
        try:
            yield
        except BaseException as error:
            unit.end(error)
            raise
        else:
            unit.end()
        finally:
            stack.remove(unit)

    def do(self, statement: Statement, registry: RegistryName, label: str) -> None:
        registry = self.setup.known(registry)
        unit = self.current()
        if statement == "remove":
            self.remove(unit, registry)
            return
        unit.in_use = True
        session = unit.sessions.setdefault(registry, Connected(registry in self.setup.twophase))
        if statement == "interrupt commit":
            session.trap = True
        elif statement == "rollback":
            session.transaction = None
        elif statement == "commit":
            try:
                session.commit(self.rows(unit.lane, registry))
            except BaseException:
                session.transaction = None
                raise
        elif statement == "flush":
            if session.transaction is not None:
                session.transaction.flush()
        else:
            if session.transaction is None:
                session.transaction = Transaction()
            self.work(session.transaction, statement, label)

    def remove(self, unit: Unit, registry: RegistryName) -> None:
        session = unit.sessions.pop(registry, None)
        if session is None or session.transaction is None:
            return
        wrote = session.transaction.has_written()
        if wrote:
            unit.discarded = True
        elif wrote is None and registry not in self.warned:
            self.warned.add(registry)  # once for a line
            self.log.append("WARNING: closed a Session")

    def work(self, transaction: Transaction, statement: Statement, label: str) -> None:
        if statement == "add":
            transaction.pending.append(label)
        elif statement == "add orphan":
            transaction.pending.append(ORPHAN)
        elif statement == "add invalid":
            transaction.pending.append(INVALID)
        else:
            transaction.flush()
            transaction.execute()
            if statement.startswith("insert"):
                transaction.rows.append(label)
            elif statement == "fail":
                transaction.aborted = self.setup.aborts
                raise Refused
            elif statement == "fail in savepoint":
                transaction.touched = self.setup.aborts  # PostgreSQL has a number for it
                transaction.doubted = not self.setup.aborts


# -- section 4: when ------------------------------------------------------------------------------


class Reference:
    """The middleware."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.app = Application(model)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        return Reply(self.model, environ, start_response).call(self.app)


class Reply:
    """One response."""

    def __init__(
        self, model: Model, environ: WSGIEnvironment, start_response: StartResponse
    ) -> None:
        self.model = model
        self.setup = model.setup
        self.environ = environ
        self.unit = model.make_unit(environ)
        self.stack = [self.unit]  # and whatever scopes the application holds between steps
        self.status: str | None = None
        self.headers: list[tuple[str, str]] = []
        self.exc_info: Any = None
        self.server = start_response
        self.is_handed_on = False
        self.writes: Any = None
        self.sent = 0
        self.result: Any = None
        self.blocks: Any = None
        self.ahead: bytes | None = NOTHING  # a block that the server has not asked for yet
        self.failure: BaseException | None = None  # of whatever was settled
        self.complete = False
        self.passed = False  # a block, to the server
        self.over = False

    # The start.

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None, /
    ) -> Callable[[bytes], object]:
        self.status, self.headers, self.exc_info = status, headers, exc_info
        if self.is_handed_on or self.setup.commit_on == "close":
            self.is_handed_on = False
            self.hand_on_the_start()
        return self.write

    def hand_on_the_start(self) -> None:
        """Make sure that the server has it; but nothing that calls a failed commit a success."""
        if self.failure is not None and (self.status or "2")[0] not in "45":
            raise self.failure
        if self.is_handed_on:
            return
        assert self.status is not None
        self.is_handed_on = True
        exc_info, self.exc_info = self.exc_info, None
        try:
            if exc_info is None:
                self.writes = self.server(self.status, self.headers)
            else:
                self.writes = self.server(self.status, self.headers, exc_info)
        finally:
            exc_info = None

    def size(self) -> float:
        """The number of bytes that make the body whole."""
        assert self.status is not None
        if self.environ["REQUEST_METHOD"] == "HEAD" or self.status[:3] == "204":
            return 0
        declared = [int(value) for name, value in self.headers if name == "Content-Length"]
        return declared[0] if declared else math.inf

    def vetoes(self) -> bool:
        assert self.status is not None
        return self.setup.vetoes and veto(self.environ, self.status, self.headers)

    # The moments.

    def settle_if_this_is_the_moment(self, complete: bool) -> None:
        first = self.setup.commit_on == "headers" and not self.is_handed_on
        if self.setup.commit_on != "close" and (complete or first) and self.unit.undecided():
            try:
                self.unit.settle(vetoes=self.vetoes)
            except BaseException as failure:
                self.failure = failure
                self.unit.doomed = True  # whatever the application makes of it, out of write()
                raise

    def completes(self, block: bytes) -> bool:
        return self.sent + len(block) >= self.size()

    def is_answerable(self) -> bool:
        failed = isinstance(self.unit.failure, Exception)
        return self.setup.commit_error and failed and self.sent == 0

    def answer(self) -> Iterable[bytes]:
        """Let the other application answer: in place of what the server has not sent yet."""
        failure = self.unit.failure
        assert failure is not None
        if self.is_handed_on:
            exc_info: Any = (type(failure), failure, failure.__traceback__)
            self.server("503 Sorry", [], exc_info)
        else:
            self.server("503 Sorry", [])
        return [b"sorry"]

    # The steps.

    def call(self, app: WSGIApplication) -> Iterable[bytes]:
        try:
            with self.step():
                try:
                    self.result = app(self.environ, self.start_response)
                    if self.setup.commit_on == "close":
                        return self
                    if self.environ["tests.plan"].body in FINISHED:
                        self.settle_if_this_is_the_moment(True)
                        self.hand_on_the_start()
                        self.over = True
                        self.unit.end(vetoes=self.vetoes)
                        finished: Iterable[bytes] = self.result
                        return finished
                    self.ahead = self.advance()  # some servers take the start when this returns
                    return self
                except BaseException as error:
                    self.finish(error)
                    raise
        except Exception:
            if not self.is_answerable():
                raise
            return self.answer()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        block, self.ahead = self.ahead, NOTHING
        if block is NOTHING and self.passed and not self.over and self.is_head():
            block = None  # the rest is never sent, and may be endless
        if block is NOTHING:
            if self.over:
                rest: bytes = next(self.blocks)
                return rest
            try:
                with self.step():
                    try:
                        block = self.advance()
                    except BaseException as error:
                        self.finish(error)
                        raise
            except Exception:
                if not self.is_answerable():
                    raise
                return b"".join(self.answer())
        if block is None:
            raise StopIteration
        self.passed = True
        return block

    def is_head(self) -> bool:
        return bool(self.environ["REQUEST_METHOD"] == "HEAD")

    def advance(self) -> bytes | None:
        """Get a block from the application, settle if this is the moment, hand on the start."""
        if self.blocks is None:
            self.blocks = iter(self.result)
        block: bytes | None = next(self.blocks, None)
        if block is None or self.completes(block):
            self.complete = True
        self.settle_if_this_is_the_moment(self.complete)
        self.hand_on_the_start()
        self.sent += len(block or b"")
        return block

    def write(self, block: bytes, /) -> None:
        if self.size() == 0 and self.setup.commit_on == "complete":
            return
        self.settle_if_this_is_the_moment(self.completes(block))
        self.hand_on_the_start()
        self.sent += len(block)
        self.writes(block)

    def close(self) -> None:
        unsent = self.blocks is None and self.status is not None and self.size() == 0
        self.ahead = NOTHING
        if not self.over:
            with self.step():
                self.finish(complete=self.complete or unsent)

    def forgotten(self) -> None:
        """Be the finalizer: the Sessions are closed, and nothing of the application runs."""
        if not self.over:
            self.over = True
            if self.unit.undecided():
                self.model.lost.append("ResourceWarning")
            self.unit.sessions.clear()
            # The interpreter closes what else is dropped, generators of the application.
            self.result = self.blocks = self.ahead = None

    def finish(self, error: BaseException | None = None, complete: bool = False) -> None:
        self.over = True
        result, self.result, self.blocks = self.result, (), iter(())
        try:
            if hasattr(result, "close"):
                result.close()
        except BaseException as failure:
            self.unit.end(error or failure)
            if error is None:
                raise
            return
        self.unit.end(error, complete, self.vetoes)

    @contextmanager
    def step(self) -> Iterator[None]:
        outer, self.model.stack = self.model.stack, self.stack
        try:
            yield
        finally:
            self.model.stack = outer
