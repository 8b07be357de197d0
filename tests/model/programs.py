"""Random programs: requests, the application that carries them out, and a server for it.

All of this is the same whether the acts are done in a database, or in the model of it that
:mod:`tests.model.reference` has.
"""

from __future__ import annotations

import gc
import inspect
import io
import sys
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, cast
from wsgiref.util import FileWrapper

from hypothesis import strategies as st
from sqlalchemy.exc import SQLAlchemyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from contextlib import AbstractContextManager

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

RegistryName: TypeAlias = Literal["A", "B"]
Outcome: TypeAlias = Literal["commit", "rollback"]
Statement: TypeAlias = Literal[
    "add",  # a new object, flushed later
    "add orphan",  # the same, and its foreign key fails when the database commits
    "add invalid",  # the same, and the flush fails
    "insert",  # a statement at once, which the Session does not see as a change
    "fail",  # the same, and the database refuses it
    "read",
    "flush",
    "insert in savepoint",
    "fail in savepoint",  # and the savepoint is rolled back
    "interrupt commit",  # the next commit of this Session is hit by a timeout
    "commit",  # and where that fails, roll back and raise
    "rollback",
    "remove",
]


class Boom(Exception):  # noqa: N818 - a plain error of the application
    pass


class Interruption(BaseException):
    """What ``gevent.Timeout`` and ``GreenletExit`` are: no ``Exception``."""


class Brief:
    """A dataclass that shows what is not as usual, for programs that can be read."""

    def __repr__(self) -> str:
        shown = []
        for each in fields(self):  # type: ignore[arg-type]
            value = getattr(self, each.name)
            if value != each.default:
                shown.append(f"{each.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"


# -- what an application may do -------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Do(Brief):
    statement: Statement
    registry: RegistryName = "A"


@dataclass(frozen=True, repr=False)
class Say(Brief):
    what: Literal["doom", "keep"]


@dataclass(frozen=True, repr=False)
class Raise(Brief):
    error: type[BaseException]


@dataclass(frozen=True, repr=False)
class Hook(Brief):
    """Register a hook that leaves a note that it ran, and does a bit more."""

    when: Outcome
    then: Literal["nothing", "raise", "add", "register another"] = "nothing"


@dataclass(frozen=True, repr=False)
class Write(Brief):
    """Use the write() of PEP 3333."""

    size: int


@dataclass(frozen=True, repr=False)
class Answer(Brief):
    """Call start_response with exc_info, as frameworks do that turn an error into a response."""

    status: str


@dataclass(frozen=True, repr=False)
class Swallow(Brief):
    """Catch whatever ``Exception`` these acts raise."""

    acts: tuple[Act, ...]


@dataclass(frozen=True, repr=False)
class Block(Brief):
    """Do these acts in a ``session_scope`` of their own."""

    acts: tuple[Act, ...]


@dataclass(frozen=True, repr=False)
class Hold(Brief):
    """Enter a ``session_scope`` and stay in it while blocks are handed on."""


@dataclass(frozen=True, repr=False)
class LetGo(Brief):
    """Leave each ``session_scope`` that is held."""


@dataclass(frozen=True, repr=False)
class Ask(Brief):
    """Make a request in-process, take so many blocks, and close the response or forget it."""

    plan: Plan
    blocks: int = 9
    closes: bool = True


Act: TypeAlias = Do | Say | Raise | Hook | Write | Answer | Swallow | Block | Hold | LetGo | Ask

FINISHED = ("list", "tuple", "file wrapper")
BODIES = (
    *FINISHED,
    "list subclass",
    "sized iterable",
    "iterable without close",
    *("generator", "generator application") * 2,
)


@dataclass(frozen=True, repr=False)
class Plan(Brief):
    """A request, and what the application does in each step of the response to it."""

    body: str  # one of BODIES
    method: str = "GET"
    status: str = "200 OK"
    declares: int | None = None
    starts: Literal["first", "late", "never"] = "first"
    call: tuple[Act, ...] = ()
    blocks: tuple[tuple[int, tuple[Act, ...]], ...] = ()
    end: tuple[Act, ...] = ()
    close: tuple[Act, ...] = ()


class Store(Protocol):
    """Where the acts are done."""

    def begin_request(self, environ: WSGIEnvironment) -> None: ...
    def do(self, statement: Statement, registry: RegistryName, label: str) -> None: ...
    def say(self, what: Literal["doom", "keep"]) -> None: ...
    def hook(self, hook: Hook, label: str) -> None: ...
    def block(self) -> AbstractContextManager[object]: ...
    def ask(self, environ: WSGIEnvironment) -> Exchange: ...


# -- the application ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Application:
    """A WSGI application that does what the plan in its environ says."""

    store: Store

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        self.store.begin_request(environ)
        run = Run(self.store, environ, start_response)
        plan = run.plan
        if plan.body == "generator application":
            return run.blocks(run.call)
        run.call()
        if plan.body == "generator":
            return run.blocks()
        sizes = [size for size, _ in plan.blocks]
        if plan.body == "list":
            return [b"x" * size for size in sizes]
        if plan.body == "tuple":
            return tuple(b"x" * size for size in sizes)
        if plan.body == "file wrapper":
            wrapped: Iterable[bytes] = environ["wsgi.file_wrapper"](io.BytesIO(b"x" * sum(sizes)))
            return wrapped
        if plan.body == "list subclass":
            return Rows(run)
        return Sized(run) if plan.body == "sized iterable" else Unclosable(run)


def environ_for(plan: Plan, name: str) -> WSGIEnvironment:
    return {
        "REQUEST_METHOD": plan.method,
        "PATH_INFO": f"/{name}",
        "wsgi.file_wrapper": FileWrapper,
        "tests.plan": plan,
        "tests.name": name,
    }


class Run:
    """One response of the application."""

    def __init__(
        self, store: Store, environ: WSGIEnvironment, start_response: StartResponse
    ) -> None:
        self.store = store
        self.plan: Plan = environ["tests.plan"]
        self.name: str = environ["tests.name"]
        self.start_response = start_response
        self.writes: Callable[[bytes], object] | None = None
        self.held = ExitStack()

    def start(self, status: str, exc_info: Any = None) -> None:
        headers = []
        if self.plan.declares is not None:
            headers.append(("Content-Length", str(self.plan.declares)))
        if exc_info is None:
            self.writes = self.start_response(status, headers)
        else:
            self.writes = self.start_response(status, headers, exc_info)

    def start_late(self) -> None:
        if self.plan.starts == "late" and self.writes is None:
            self.start(self.plan.status)

    def call(self) -> None:
        if self.plan.starts == "first":
            self.start(self.plan.status)
        self.act(f"{self.name}.call", self.plan.call)
        if self.plan.body in FINISHED:
            self.start_late()

    def blocks(self, first: Callable[[], object] = bool) -> Iterator[bytes]:
        with self.held:
            try:
                first()
                for number, (size, acts) in enumerate(self.plan.blocks):
                    self.act(f"{self.name}.{number}", acts)
                    self.start_late()
                    yield b"x" * size
                self.act(f"{self.name}.end", self.plan.end)
                self.start_late()
            finally:
                if self.plan.body.startswith("generator"):
                    self.close()

    def close(self) -> None:
        self.act(f"{self.name}.close", self.plan.close)

    def act(self, path: str, acts: tuple[Act, ...]) -> None:
        for number, act in enumerate(acts):
            self.do(f"{path}.{number}", act)

    def do(self, path: str, act: Act) -> None:
        store = self.store
        match act:
            case Do(statement, registry):
                store.do(statement, registry, path)
            case Say(what):
                store.say(what)
            case Raise(error):
                raise error
            case Hook():
                store.hook(act, path)
            case Write(size):
                self.start_late()
                if self.writes is not None:
                    self.writes(b"x" * size)
            case Answer(status):
                if self.plan.starts != "never":
                    try:
                        raise Boom
                    except Boom:
                        self.start(status, sys.exc_info())
            case Swallow(acts):
                with suppress(Exception):
                    self.act(path, acts)
            case Block(acts):
                with store.block():
                    self.act(path, acts)
            case Hold() if self.plan.body != "iterable without close":
                self.held.enter_context(store.block())
            case LetGo():
                self.held.close()
            case Ask(plan, blocks, closes):
                self.ask(environ_for(plan, path), blocks, closes)

    def ask(self, environ: WSGIEnvironment, blocks: int, closes: bool) -> None:
        exchange = self.store.ask(environ)
        exchange.call()
        while exchange.goes_on() and blocks > 0:
            exchange.next()
            blocks -= 1
        if closes:
            exchange.close()
        else:
            exchange.forget()


class Unclosable:
    """An iterable that runs code, and has no ``close()``."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def __iter__(self) -> Iterator[bytes]:
        return self._run.blocks()


class Sized:
    """An iterable that runs code, and knows its length."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._blocks: Any = None

    def __len__(self) -> int:
        return len(self._run.plan.blocks)

    def __iter__(self) -> Iterator[bytes]:
        self._blocks = self._run.blocks()
        return iter(self._blocks)

    def close(self) -> None:
        try:
            if self._blocks is not None:
                self._blocks.close()
        finally:
            self._run.close()


class Rows(Sized, list[bytes]):
    """A list with a lazy ``__iter__``."""


# -- the server -----------------------------------------------------------------------------------


class Exchange:
    """One response between a server and its client: PEP 3333, without buffering.

    It holds no error: the traceback of one would keep an unclosed response alive.
    """

    def __init__(
        self,
        app: WSGIApplication,
        environ: WSGIEnvironment,
        when_whole: Callable[[WSGIEnvironment, str], object] | None = None,
    ) -> None:
        self.app = app
        self.environ = environ
        self.when_whole = when_whole
        self.status: str | None = None  # as the client has it
        self.received = 0
        self.ended = False  # the client was told that this is all
        self.whole = False
        self.errors: list[str] = []  # those that reached the server
        self.phase: Literal["new", "body", "ended", "failed", "closed"] = "new"
        self._start: tuple[str, list[tuple[str, str]]] | None = None
        self._declared: int | None = None
        self._result: Iterable[bytes] | None = None
        self._blocks: Iterator[bytes] | None = None

    def view(self) -> dict[str, object]:
        """Return what can be seen from outside."""
        return {
            "name": self.environ["tests.name"],
            "status": self.status,
            "received": self.received,
            "whole": self.whole,
            "errors": self.errors,
            "phase": self.phase,
        }

    def goes_on(self) -> bool:
        return self.phase == "body"

    def is_bodyless(self) -> bool:
        """Say whether the headers alone are the whole response."""
        status = self.status or (self._start or ("",))[0]
        return self.environ["REQUEST_METHOD"] == "HEAD" or status[:3] in ("204", "304")

    # Each of these is a step.

    def call(self) -> None:
        try:
            self._result = self.app(self.environ, self._start_response)
            self.phase = "body"
        except BaseException as error:
            self._fail(error)

    def next(self) -> None:
        try:
            if self._blocks is None:
                assert self._result is not None
                self._blocks = iter(self._result)
            block = next(self._blocks, None)
            if block is None:
                self.phase = "ended"
                self._send_head()
                self.ended = True
                self._look()
            elif block:
                self._send(block)
        except BaseException as error:
            self._fail(error)

    def close(self) -> None:
        result, unsent = self._result, self._blocks is None and self.phase == "body"
        self._result = self._blocks = None
        self.phase = "closed"
        try:
            close = getattr(result, "close", None)
            if close is not None:
                close()
            if unsent and self._start is not None and self.is_bodyless():
                self._send_head()  # the server did not ask for a body that it must not send
                self._look()
        except BaseException as error:
            self.errors.append(name_of(error))

    def forget(self) -> None:
        """Let the response go, without a word to it; the model has to be told."""
        forgotten = getattr(self._result, "forgotten", None)
        frames = [] if forgotten else frames_of(self._result)
        self._result = self._blocks = None
        self.phase = "closed"
        if forgotten is not None:
            forgotten()
            return
        for frame in frames:
            frame.clear()
        gc.collect()

    def _start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None, /
    ) -> Callable[[bytes], object]:
        try:
            if exc_info is None:
                assert self._start is None, "start_response was called twice"
            elif self.status is not None:
                raise exc_info[1]
        finally:
            exc_info = None
        self._start = status, headers
        return self._send

    def _send_head(self) -> None:
        if self.status is None:
            assert self._start is not None, "start_response was never called"
            self.status, headers = self._start
            for name, value in headers:
                if name == "Content-Length":
                    self._declared = int(value)

    def _send(self, block: bytes) -> None:
        if block:
            self._send_head()
            if not self.is_bodyless():
                self.received += len(block)
            self._look()

    def _look(self) -> None:
        """Notice the moment at which the client has a whole response."""
        if not self.whole and (
            self.is_bodyless()
            or (self.ended if self._declared is None else self.received >= self._declared)
        ):
            self.whole = True
            if self.when_whole is not None and self.status is not None:
                self.when_whole(self.environ, self.status)

    def _fail(self, error: BaseException) -> None:
        self.phase = "failed"
        self.errors.append(name_of(error))
        if self.status is None:
            self.status = "500 Internal Server Error"
            self.ended = self.whole = True


def frames_of(response: object) -> list[FrameType]:
    """Return the frames of calls that are over, and still have the response.

    A Session remembers why its flush failed, with a traceback. From Python 3.12 on that has the
    calls that a generator was resumed by, so the response stays referenced until the Session
    is closed.
    """
    return [
        each
        for each in gc.get_referrers(response)
        # Not a generator that waits: to clear its frame is to close it.
        if isinstance(each, FrameType) and not each.f_code.co_flags & inspect.CO_GENERATOR
    ]


def name_of(error: BaseException) -> str:
    return "database error" if isinstance(error, SQLAlchemyError) else type(error).__name__


# -- strategies -----------------------------------------------------------------------------------

OUTCOMES: tuple[Outcome, ...] = ("commit", "rollback")
REGISTRIES: tuple[RegistryName, ...] = ("A", "B")
STATUSES = (
    *("200 OK",) * 5,
    "204 No Content",
    "303 See Other",
    "404 Not Found",
    "418 I'm a teapot",  # for which the veto of the tests raises
    "503 Service Unavailable",
)
STATEMENTS: tuple[Statement, ...] = (
    *("add", "insert") * 6,
    *("add orphan", "interrupt commit", "insert in savepoint", "fail in savepoint") * 2,
    *("add invalid", "fail", "read", "flush", "commit", "rollback", "remove"),
)
SIMPLE: tuple[Act, ...] = (
    *(Do(statement, registry) for statement in STATEMENTS for registry in REGISTRIES),
    # An error that the application takes for harmless, though it spoils the transaction.
    *(Swallow((Do("add invalid", registry), Do("flush", registry))) for registry in REGISTRIES),
    *(Swallow((Do("fail", registry),)) for registry in REGISTRIES),
    *(Hook(when) for when in OUTCOMES for _ in range(2)),
    *(Hook(when, then) for when in OUTCOMES for then in ("raise", "add", "register another")),
    *(Say("doom"), Say("keep")),
    *(Raise(Boom), Raise(Interruption)) * 2,
)
IN_CALL: tuple[Act, ...] = (
    *(Write(0), Write(1), Write(2)),
    *(Swallow((Write(1),)), Swallow((Do("add orphan"), Write(1)))),
    *(Answer("200 OK"), Answer("503 Sorry")),
)
BETWEEN: tuple[Act, ...] = (Hold(), Hold(), LetGo(), Answer("503 Sorry"))


SIZES = st.sampled_from((1, 1, 2, 0))


def acts(depth: int, special: tuple[Act, ...] = ()) -> st.SearchStrategy[tuple[Act, ...]]:
    """Return what draws the acts of a step; `depth` says how deep requests make others."""
    simple = st.sampled_from(SIMPLE)
    inner = st.lists(simple, max_size=2).map(tuple)
    kinds: list[st.SearchStrategy[Act]] = [simple] * 9
    kinds += [inner.map(lambda acts: Swallow(acts))] * 2
    if special:
        kinds += [st.sampled_from(special)] * 2
    if depth > 0:
        kinds += [
            inner.map(lambda acts: Block(acts)),
            st.tuples(plans(depth - 1), st.sampled_from((9, 9, 1, 0)), st.booleans()).map(
                lambda drawn: Ask(*drawn)
            ),
        ]
    some = st.lists(st.one_of(kinds), max_size=3).map(tuple)
    return st.deferred(lambda: some)  # whose repr is short


def plans(depth: int = 1) -> st.SearchStrategy[Plan]:
    """Return what draws requests; `depth` says how deep they make others."""
    step = acts(depth)
    some = st.fixed_dictionaries(
        {
            "body": st.sampled_from(BODIES),
            "method": st.sampled_from(("GET", "POST", "POST", "HEAD")),
            "status": st.sampled_from(STATUSES),
            "declares": st.sampled_from((None, None, None, 1, 2, 3, 0)),
            "starts": st.sampled_from((*("first", "late") * 5, "never")),
            "call": acts(depth, IN_CALL),
            "blocks": st.lists(st.tuples(SIZES, acts(depth, BETWEEN)), max_size=3).map(tuple),
            "end": step,
            "close": step,
        }
    ).map(lambda drawn: Plan(**cast("dict[str, Any]", drawn)))
    return st.deferred(lambda: some)
