"""WSGI applications and servers, small ones, for the tests of the core."""

from __future__ import annotations

import io
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from wsgiref.handlers import SimpleHandler
from wsgiref.util import FileWrapper, setup_testing_defaults

import pytest
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.orm.session import _sessions

from wsgi_dbsession import NoScopeError, current_scope

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator
    from types import TracebackType

    from _typeshed import OptExcInfo
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from sqlalchemy import Connection, Engine

    Headers = list[tuple[str, str]]
    ExcInfo = (
        tuple[type[BaseException], BaseException, TracebackType] | tuple[None, None, None] | None
    )


def make_registry(engine: Engine | Connection | None, **options: Any) -> scoped_session[Session]:
    """Make a session registry as an application does."""
    return scoped_session(sessionmaker(engine, **options), scopefunc=current_scope)


def open_sessions(registry: scoped_session[Session]) -> list[Session]:
    """Return the Sessions of this registry that hold a transaction, whoever has them."""
    kind = registry.session_factory.class_
    return [
        each for each in _sessions.values() if isinstance(each, kind) and each.in_transaction()
    ]


def assert_nothing_left(*registries: scoped_session[Session]) -> None:
    """Fail if a scope, a Session or a connection is left."""
    with pytest.raises(NoScopeError):
        current_scope()
    # A scope that is over is not found, but the context must not keep it either.
    variables = [each for each in copy_context().items() if each[0].name == "wsgi_dbsession.scope"]
    assert [value for _, value in variables if value is not None] == []
    for registry in registries:
        assert not open_sessions(registry)
        pool: Any = registry.session_factory.kw["bind"].pool
        assert pool.checkedout() == 0


# -- servers --------------------------------------------------------------------------------------


def make_environ(
    method: str = "GET", path: str = "/", body: bytes = b"", **more: Any
) -> WSGIEnvironment:
    """Make the environ of a request."""
    environ: WSGIEnvironment = {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": "",
        "PATH_INFO": path,
        "QUERY_STRING": "",
        "wsgi.input": io.BytesIO(body),
        "wsgi.file_wrapper": FileWrapper,
    }
    if body:
        environ["CONTENT_LENGTH"] = str(len(body))
    environ.update(more)
    setup_testing_defaults(environ)
    return environ


@dataclass
class Reply:
    """What a client got, and what the server saw."""

    status: str
    headers: dict[str, str]
    body: bytes
    whole: bool
    """Whether the client takes the response for a whole one."""
    errors: list[BaseException]
    """What was raised into the server."""


def ask(app: WSGIApplication, method: str = "GET", path: str = "/", **environ: Any) -> Reply:
    """Send a request to wsgiref's server loop, and return the reply."""
    loop = Loop(make_environ(method, path, **environ))
    loop.run(app)
    head, _, body = loop.sent().partition(b"\r\n\r\n")
    headers = dict(line.split(": ", 1) for line in head.decode("latin-1").split("\r\n"))
    length = headers.get("Content-Length")
    whole = loop.first is not None or method == "HEAD" or length == str(len(body))
    return Reply(headers.pop("Status"), headers, body, whole, loop.errors)


class Loop(SimpleHandler):
    """The server loop of wsgiref, with memory in place of a socket."""

    origin_server = False  # the first line is "Status: 200 OK", a header like the others
    os_environ = {}  # noqa: RUF012 - wsgiref's way to say which environment it starts from

    def __init__(self, environ: WSGIEnvironment) -> None:
        self.output = io.BytesIO()
        super().__init__(io.BytesIO(), self.output, io.StringIO(), environ)
        self.errors: list[BaseException] = []
        self.first: bytes | None = None

    def sent(self) -> bytes:
        """Return the response that was sent: the first, if there is one after a close."""
        return self.output.getvalue() if self.first is None else self.first

    def finish_content(self) -> None:
        """Note that the body is finished: here another server sends the last chunk's marker."""
        super().finish_content()
        if self.first is None:
            self.first = self.output.getvalue()

    def log_exception(self, exc_info: OptExcInfo) -> None:
        """Keep the error in place of printing it."""
        assert exc_info[1] is not None
        self.errors.append(exc_info[1])


@dataclass
class Server:
    """A server of which the test makes every step, and that writes down what it is told."""

    trace: list[str] = field(default_factory=list)
    starts: list[tuple[str, Headers, ExcInfo]] = field(default_factory=list)
    written: list[bytes] = field(default_factory=list)

    @property
    def status(self) -> str:
        """The status of the last start."""
        return self.starts[-1][0]

    @property
    def headers(self) -> Headers:
        """The headers of the last start."""
        return self.starts[-1][1]

    @property
    def body(self) -> bytes:
        """What was sent."""
        return b"".join(self.written)

    def start_response(
        self, status: str, headers: Headers, exc_info: ExcInfo = None, /
    ) -> Callable[[bytes], object]:
        """Refuse a second start without an error, and an error that comes too late."""
        assert exc_info is not None or not self.starts, "start_response was called twice"
        if exc_info is not None and any(self.written):
            assert exc_info[1] is not None
            raise exc_info[1]
        self.trace.append(f"start {status[:3]}")
        self.starts.append((status, headers, exc_info))
        return self.write

    def write(self, block: bytes, /) -> None:
        """Send a block."""
        assert self.starts, "a block was sent before start_response was called"
        self.trace.append(f"block {block.decode('latin-1')}")
        self.written.append(block)

    def run(
        self, app: WSGIApplication, environ: WSGIEnvironment, *, blocks: int | None = None
    ) -> None:
        """Make all steps, or go away after some blocks."""
        result = app(environ, self.start_response)
        try:
            if blocks != 0:
                for number, block in enumerate(result, 1):
                    self.write(block)
                    if number == blocks:
                        break
                else:
                    self.trace.append("end")
        finally:
            close = getattr(result, "close", None)
            if close is not None:
                close()


def drive(app: WSGIApplication, method: str = "GET", body: bytes = b"", **more: Any) -> Server:
    """Make all steps of a request for ``/path``, and return the server that made them."""
    server = Server()
    server.run(app, make_environ(method, "/path", body, **more))
    return server


# -- applications ---------------------------------------------------------------------------------


def nothing() -> None:
    """Do nothing."""


@dataclass
class Program:
    """What an application does: first, between its two blocks, after them, and at its close."""

    early: Callable[[], object] = nothing
    late: Callable[[], object] = nothing
    last: Callable[[], object] = nothing
    closing: Callable[[], object] = nothing
    status: str = "200 OK"
    headers: list[tuple[str, str]] = field(default_factory=lambda: [("Content-Type", "a/b")])
    blocks: tuple[bytes, bytes] = (b"one", b"two")
    closed: int = 0

    def with_length(self) -> Headers:
        """Return the headers, and the body's length."""
        return [*self.headers, ("Content-Length", str(sum(map(len, self.blocks))))]

    def all_at_once(self) -> tuple[bytes, bytes]:
        """Do everything before there is a body."""
        self.early()
        self.late()
        self.last()
        return self.blocks

    def block_by_block(self) -> Generator[bytes]:
        """Do it while the body is being made."""
        try:
            yield self.blocks[0]
            self.late()
            yield self.blocks[1]
            self.last()
        finally:
            self.closed += 1
            self.closing()


NO_BLOCKS: Generator[bytes] = (b"" for _ in ())


class Sized:
    """A body that knows its number of blocks, and makes them while it is iterated over."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.blocks = NO_BLOCKS

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[bytes]:
        self.blocks = self.program.block_by_block()
        return self.blocks

    def close(self) -> None:
        """Close what runs."""
        self.blocks.close()


class SizedList(list[bytes]):
    """A list that runs code of the application when it is iterated over."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.blocks)
        self.program = program

    def __iter__(self) -> Iterator[bytes]:
        return self.program.block_by_block()


class NoClose:
    """An iterator without ``close()``."""

    def __init__(self, blocks: Iterable[bytes]) -> None:
        self.blocks = iter(blocks)

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return next(self.blocks)


def list_app(program: Program) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        blocks = program.all_at_once()
        start_response(program.status, program.headers)
        return list(blocks)

    return app


def tuple_app(program: Program) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        blocks = program.all_at_once()
        start_response(program.status, program.headers)
        return blocks

    return app


def file_app(program: Program) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        blocks = program.all_at_once()
        start_response(program.status, program.headers)
        wrap: Callable[[io.BytesIO, int], Iterable[bytes]] = environ["wsgi.file_wrapper"]
        return wrap(io.BytesIO(b"".join(blocks)), 3)

    return app


def sized_app(program: Program) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        program.early()
        start_response(program.status, program.headers)
        return Sized(program)

    return app


def sized_list_app(program: Program) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        program.early()
        start_response(program.status, program.headers)
        return SizedList(program)

    return app


def generator(program: Program) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        program.early()
        start_response(program.status, program.headers)
        return program.block_by_block()

    return app


def generator_app(program: Program) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        program.early()
        start_response(program.status, program.headers)
        yield from program.block_by_block()

    return app


def iterator_without_close(program: Program) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        program.early()
        start_response(program.status, program.headers)
        return NoClose(program.block_by_block())

    return app


def generator_with_length(program: Program) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        program.early()
        start_response(program.status, program.with_length())
        return program.block_by_block()

    return app


def writing_app(program: Program) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        program.early()
        write = start_response(program.status, program.headers)
        write(program.blocks[0])
        program.late()
        write(program.blocks[1])
        program.last()
        return []

    return app


class Counted:
    """A body that counts how often it is closed."""

    def __init__(self, blocks: Iterable[bytes]) -> None:
        self.blocks = iter(blocks)
        self.closed = 0

    def __iter__(self) -> Iterator[bytes]:
        return self.blocks

    def close(self) -> None:
        """Count."""
        self.closed += 1


BODIES: dict[str, Callable[[Program], WSGIApplication]] = {
    "list body": list_app,
    "tuple body": tuple_app,
    "file wrapper": file_app,
    "sized iterable": sized_app,
    "list subclass": sized_list_app,
    "unsized generator": generator,
    "generator application": generator_app,
    "iterator without close": iterator_without_close,
    "generator with a length": generator_with_length,
    "write()": writing_app,
}

# No code of the application is left to run when the call has returned.
ALL_AT_ONCE = ("list body", "tuple body", "file wrapper", "write()")
BLOCK_BY_BLOCK = tuple(name for name in BODIES if name not in ALL_AT_ONCE)
