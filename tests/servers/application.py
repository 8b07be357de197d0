"""The application that every server serves: bare WSGI behind SessionMiddleware, on PostgreSQL.

One module, imported by each server as its documentation says. The first part of the path chooses
how the middleware is set up (`MOUNTS`), the second what to do (`ENDPOINTS`), the query string the
particulars.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from wsgi_dbsession import NoScopeError, SessionMiddleware, current_scope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    Body = Iterable[bytes]
    Registry = scoped_session[Session]
    Query = dict[str, str]

logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")

# PGAPPNAME in the environment names this server's connections, so that the tests find them.
URL = os.environ["DATABASE_URL"]
ENGINE = create_engine(URL, pool_size=5, max_overflow=5, pool_timeout=20)
NARROW_ENGINE = create_engine(URL, pool_size=2, max_overflow=0, pool_timeout=2)
WIDE = scoped_session(sessionmaker(ENGINE), scopefunc=current_scope)
NARROW = scoped_session(sessionmaker(NARROW_ENGINE), scopefunc=current_scope)

# What a preloading server does before it forks: the application is imported, and has used its
# database.
with ENGINE.connect() as connection:
    IMPORT_BACKEND: int = connection.scalar(text("SELECT pg_backend_pid()"))
IMPORT_PID = os.getpid()

BLOCK = b"0123456789abcdef" * 64
FILE = Path(__file__)
LARGE = b"x" * (4 << 20)
#: (token, thread, monotonic time) of each step of the streams, to see whether they interleaved.
STEPS: list[tuple[str, int, float]] = []
#: how often the server used sendfile through Python's os module.
SENDFILES = [0]


def _counted(sendfile: Callable[..., int]) -> Callable[..., int]:
    def counting(*args: Any, **kwargs: Any) -> int:
        SENDFILES[0] += 1
        return sendfile(*args, **kwargs)

    return counting


os.sendfile = _counted(os.sendfile)


def _insert(session: Registry | None, query: Query) -> None:
    """Insert the request's row; with `commit=fails`, one that PostgreSQL refuses at COMMIT."""
    if session is None:  # without the middleware
        return
    session.execute(text("INSERT INTO note VALUES (:t)"), {"t": query["token"]})
    if query.get("commit") == "fails":
        session.execute(
            text("INSERT INTO child VALUES (:t, 'no such parent')"), {"t": query["token"]}
        )


class Sized:
    """An iterable of one block that has a length, and is no list."""

    def __init__(self, block: bytes):
        self.block = block

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[bytes]:
        return iter([self.block])


class WorkError(Exception):
    """The error that the application makes on demand."""


def respond(
    environ: WSGIEnvironment, start: StartResponse, session: Registry, query: Query
) -> Body:
    """Answer with the `kind` of body that was asked for, and `raise` where it was asked for."""
    kind, where = query["kind"], query.get("raise")

    def at(point: str) -> None:
        if where == point:
            raise WorkError(point)

    _insert(session, query)
    at("call")
    blocks = {"empty": 0, "one": 1, "list of one": 1, "sized": 1}.get(kind.split(",")[0], 3)
    headers = [("Content-Type", "text/plain")]
    if "length" in kind:
        headers.append(("Content-Length", str(blocks * len(BLOCK))))

    def generate() -> Iterator[bytes]:
        at("first")
        for number in range(blocks):
            if number:
                at("between")
            yield BLOCK
        at("end")

    if kind.startswith("write"):
        write = start("200 OK", headers)
        for _ in range(blocks):
            write(BLOCK)
        at("end")
        return []
    start("200 OK", headers)
    if kind.startswith("list"):
        return [BLOCK] * blocks
    if kind.startswith("sized"):
        return Sized(BLOCK)
    return generate()


def stream(
    environ: WSGIEnvironment, start: StartResponse, session: Registry, query: Query
) -> Body:
    """Insert a row, then stream `blocks` of `size`, and use the session in every step."""
    token = query["token"]
    start("200 OK", [("Content-Type", "application/octet-stream")])
    first = session()
    first.info["token"] = token
    _insert(session, query)

    def generate() -> Iterator[bytes]:
        block = b"s" * int(query["size"])
        for _ in range(int(query["blocks"])):
            current = session()
            if current is not first or current.info["token"] != token:
                raise AssertionError("a step saw a session that is not its own")
            visible = session.scalar(
                text("SELECT count(*) FROM note WHERE token = :t"), {"t": token}
            )
            if visible != 1:
                raise AssertionError("a step does not see the row of its own transaction")
            STEPS.append((token, threading.get_ident(), time.monotonic()))
            yield block
            time.sleep(float(query.get("pause", "0")))

    return generate()


def identity(
    environ: WSGIEnvironment, start: StartResponse, session: Registry, query: Query
) -> Body:
    """Tell which process, backend and transaction served the request, after a little work."""
    _insert(session, query)
    row = session.execute(text("SELECT pg_backend_pid(), txid_current()")).one()
    first = session()
    first.info.setdefault("token", query["token"])
    session.execute(text("SELECT pg_sleep(:s)"), {"s": float(query.get("sleep", "0.005"))})
    backend, transaction = session.execute(text("SELECT pg_backend_pid(), txid_current()")).one()
    body = {
        "pid": os.getpid(),
        "backend": backend,
        "transaction": transaction,
        "same": (backend, transaction) == tuple(row) and session() is first,
        "token": first.info["token"],
        "seen": session.scalar(
            text("SELECT count(*) FROM note WHERE token = :t"), {"t": query["token"]}
        ),
        "import": [IMPORT_PID, IMPORT_BACKEND],
    }
    return _json(start, body)


def large(environ: WSGIEnvironment, start: StartResponse, session: Registry, query: Query) -> Body:
    """Insert a row and answer with a finished body larger than the buffers in between."""
    _insert(session, query)
    start("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(LARGE)))])
    return [LARGE]


def hang(environ: WSGIEnvironment, start: StartResponse, session: Registry, query: Query) -> Body:
    """Insert a row, tell PostgreSQL which process this is, and come back much too late."""
    _insert(session, query)
    session.execute(
        text("SELECT set_config('application_name', :name, true)"),
        {"name": f"{os.environ['PGAPPNAME']} {os.getpid()}"},
    )
    time.sleep(60)
    return _json(start, {})


def file(environ: WSGIEnvironment, start: StartResponse, session: Registry, query: Query) -> Body:
    """Send a file as PEP 3333 says."""
    opened = FILE.open("rb")
    headers = [("Content-Type", "text/plain")]
    if query.get("length"):
        headers.append(("Content-Length", str(FILE.stat().st_size)))
    start("200 OK", headers)
    if "wsgi.file_wrapper" in environ:
        wrapper: Callable[..., Body] = environ["wsgi.file_wrapper"]
        return wrapper(opened, 4096)
    return iter(lambda: opened.read(4096), b"")


def status(
    environ: WSGIEnvironment, start: StartResponse, session: Registry, query: Query
) -> Body:
    """Answer with a status that has no body."""
    start(query["status"], [])
    return []


ENDPOINTS: dict[str, Callable[[WSGIEnvironment, StartResponse, Any, Query], Body]] = {
    "respond": respond,
    "stream": stream,
    "identity": identity,
    "large": large,
    "hang": hang,
    "file": file,
    "status": status,
}


def _json(start: StartResponse, value: object) -> Body:
    body = json.dumps(value).encode()
    start("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]


def _lazily(call: Callable[[], Body]) -> Iterator[bytes]:
    """Run nothing, not even start_response, before the server asks for the first block."""
    yield from call()


def _query(environ: WSGIEnvironment) -> Query:
    # PEP 3333 lets a server leave it out if it is empty; bjoern does.
    return dict(parse_qsl(environ.get("QUERY_STRING", "")))


def _serve(registry: Registry | None) -> WSGIApplication:
    def serve(environ: WSGIEnvironment, start: StartResponse) -> Body:
        name = environ["PATH_INFO"].rpartition("/")[2]
        endpoint, query = ENDPOINTS[name], _query(environ)
        if query.get("kind") == "generator application":
            return _lazily(lambda: endpoint(environ, start, registry, query))
        return endpoint(environ, start, registry, query)

    return serve


def _answer(environ: WSGIEnvironment, start: StartResponse) -> Body:
    start("503 Service Unavailable", [("Content-Type", "text/plain"), ("Content-Length", "9")])
    return [b"not saved"]


MOUNTS: dict[str, WSGIApplication] = {
    "default": SessionMiddleware(_serve(WIDE), WIDE),
    "answered": SessionMiddleware(_serve(WIDE), WIDE, commit_error=_answer),
    "headers": SessionMiddleware(_serve(WIDE), WIDE, commit_on="headers"),
    "close": SessionMiddleware(_serve(WIDE), WIDE, commit_on="close"),
    "narrow": SessionMiddleware(_serve(NARROW), NARROW),
    "bare": _serve(None),
}


def _state() -> dict[str, object]:
    """Tell what is left over in this process, seen from outside any request."""
    try:
        current_scope()
        left = True
    except NoScopeError:
        left = False
    return {
        "pid": os.getpid(),
        "scope": left,
        "sessions": sum(len(r.registry.registry) for r in (WIDE, NARROW)),
        "connections": ENGINE.pool.checkedout() + NARROW_ENGINE.pool.checkedout(),  # type: ignore[attr-defined]
        "sendfiles": SENDFILES[0],
        "steps": STEPS[-2000:],
        "threads": threading.active_count(),
    }


def _interleave(start: StartResponse, query: Query) -> Body:
    """Step two streams in turn in this very thread, as a single-threaded event loop does."""
    bodies = []
    for number in range(2):
        environ = {
            "REQUEST_METHOD": "GET",
            "SCRIPT_NAME": "",
            "PATH_INFO": "/default/stream",
            "QUERY_STRING": f"token={query['token']}-{number}&size=10&blocks=5",
            "SERVER_PROTOCOL": "HTTP/1.1",
        }

        def started(*args: object) -> Callable[[bytes], object]:
            return lambda block: None

        bodies.append(iter(MOUNTS["default"](environ, started)))
    order = []
    pending = list(enumerate(bodies))
    while pending:
        for number, body in list(pending):
            if next(body, None) is None:
                pending.remove((number, body))
            order.append(number)
    for body in bodies:
        close: Callable[[], object] = getattr(body, "close", lambda: None)
        close()
    return _json(start, {"order": order, **_state()})


def application(environ: WSGIEnvironment, start_response: StartResponse) -> Body:
    """Dispatch by the first part of the path; what is no mount runs outside the middleware."""
    mount = environ["PATH_INFO"].split("/")[1]
    if mount in MOUNTS:
        return MOUNTS[mount](environ, start_response)
    if mount == "interleave":
        return _interleave(start_response, _query(environ))
    return _json(start_response, _state())
