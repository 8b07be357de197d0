"""The application of the soak test, as the servers import it: bare WSGI in front of two databases.

The first part of the path chooses the middleware (:data:`MOUNTS`), the second the body, the third
the work, the fourth is the token of the transfer. What happens inside is written to a journal,
which survives the death of the process.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import resource
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote

from sqlalchemy import create_engine, event, text
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from tests.soak import controls
from tests.soak.databases import KEYS
from tests.soak.works import STEPS, WORKS, Order, Refused
from tests.support.wsgi import open_sessions
from wsgi_dbsession import Scope, SessionMiddleware, current_scope, find_scope
from wsgi_dbsession.idempotency import Idempotency
from wsgi_dbsession.retry import RetryMiddleware

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from sqlalchemy import Connection, Engine

    Body = Iterable[bytes]
    Registry = scoped_session[Session]

BLOCK = b"a step of the transfer\n"
CONTROL = os.environ.get("SOAK_CONTROL", "")

JOURNAL = os.open(os.environ["SOAK_JOURNAL"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def write(token: str, kind: str, what: str, more: str = "") -> None:
    """Write a line of the journal, at once, whole, and safe from the death of the process."""
    os.write(JOURNAL, (json.dumps([token, kind, what, more]) + "\n").encode())


class _Log(logging.Handler):
    """Writes the package's records about an outcome to the journal."""

    def emit(self, record: logging.LogRecord) -> None:
        path = getattr(record, "path", None)
        token = path.rpartition("/")[2] if path else ""
        write(token, "log", str(getattr(record, "outcome", "")), record.getMessage()[:200])


def _configure_logging() -> None:
    # The servers log each error of the application with its traceback: thousands of them.
    logging.disable(logging.NOTSET)
    logger = logging.getLogger("wsgi_dbsession")
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    logger.addHandler(_Log())


def _make_engine(url: str) -> Engine:
    options: dict[str, Any] = {"pool_size": 5, "max_overflow": 3, "pool_timeout": 1}
    if isolation := os.environ.get("SOAK_ISOLATION"):
        options["isolation_level"] = isolation
    return create_engine(url, **options)


def _make_registry(engine: Engine, **options: Any) -> Registry:
    return scoped_session(sessionmaker(engine, **options), scopefunc=current_scope)


_configure_logging()
controls.apply(CONTROL)
ENGINES = [_make_engine(os.environ[name]) for name in ("DATABASE_URL", "SOAK_BRANCH_URL")]
BANK, BRANCH = map(_make_registry, ENGINES)
# Two-phase Sessions have registries of their own, over the same databases.
BANK_2, BRANCH_2 = (_make_registry(engine, twophase=True) for engine in ENGINES)


def _note_gid(connection: Connection, xid: Any) -> None:
    scope = find_scope()
    token = scope.info.get("token", "") if scope is not None else ""
    write(token, "gid", str(xid))


for each in ENGINES:
    event.listen(each, "prepare_twophase", _note_gid)


def _order(environ: WSGIEnvironment, bank: Registry, branch: Registry) -> Order:
    query = dict(parse_qsl(environ["QUERY_STRING"]))
    token = environ["PATH_INFO"].rpartition("/")[2]
    source, target, amount = (int(query[name]) for name in ("from", "to", "n"))
    return Order(token, source, target, amount, bank, branch, write)


def _views(bank: Registry, branch: Registry) -> WSGIApplication:
    def view(environ: WSGIEnvironment, start: StartResponse) -> Body:
        _, _, body, work, token = environ["PATH_INFO"].split("/")
        order = _order(environ, bank, branch)
        if scope := find_scope():  # the controls know none
            scope.info["token"] = token
            scope.on_commit(write, token, "hook", "commit")
            scope.on_rollback(write, token, "hook", "rollback")
        return BODIES[body](WORKS[unquote(work)](order), start, order)

    return view


# -- bodies ---------------------------------------------------------------------------------------

PLAIN = ("Content-Type", "text/plain")
LENGTH = ("Content-Length", str(STEPS * len(BLOCK)))


def _exhaust(steps: Iterator[None], start: StartResponse) -> bool:
    try:
        for _ in steps:
            pass
    except Refused:
        start("409 Conflict", [PLAIN, ("Content-Length", "3")])
        return False
    return True


def _list(steps: Iterator[None], start: StartResponse, order: Order) -> Body:
    if not _exhaust(steps, start):
        return [b"no\n"]
    start("201 Created", [PLAIN, LENGTH])
    return [BLOCK] * STEPS


def _stream(steps: Iterator[None], start: StartResponse, *headers: tuple[str, str]) -> Body:
    start("201 Created", [PLAIN, *headers])

    def generate() -> Iterator[bytes]:
        for _ in steps:
            yield BLOCK

    return generate()


def _sized(steps: Iterator[None], start: StartResponse, order: Order) -> Body:
    return _stream(steps, start, LENGTH)


def _unsized(steps: Iterator[None], start: StartResponse, order: Order) -> Body:
    return _stream(steps, start)


def _write(steps: Iterator[None], start: StartResponse, order: Order) -> Body:
    send = start("201 Created", [PLAIN, LENGTH])
    for _ in steps:
        send(BLOCK)
    return []


def _late(steps: Iterator[None], start: StartResponse, order: Order) -> Body:
    """Do the work first; read the sum in the midst of the stream, in another transaction."""
    if not _exhaust(steps, start):
        return [b"no\n"]
    start("201 Created", [PLAIN])

    def generate() -> Iterator[bytes]:
        for _ in range(STEPS - 1):
            yield BLOCK
        yield b"%d\n" % order.bank.scalar(text("SELECT sum(balance) FROM account"))

    return generate()


BODIES: dict[str, Callable[[Iterator[None], StartResponse, Order], Body]] = {
    "list": _list,
    "sized": _sized,
    "unsized": _unsized,
    "write": _write,
    "late": _late,
}


# -- what looks on --------------------------------------------------------------------------------


def _read(environ: WSGIEnvironment, start: StartResponse) -> Body:
    """Tell the sum of the accounts, how often a token is there; or hold a connection."""
    query = dict(parse_qsl(environ["QUERY_STRING"]))
    if "hold" in query:
        BANK.execute(text("SELECT 1"))
        time.sleep(float(query["hold"]))
    total = BANK.scalar(text("SELECT sum(balance) FROM account"))
    found = BANK.scalar(
        text("SELECT count(*) FROM entry WHERE token = :token"), {"token": query.get("token", "")}
    )
    return _json(start, {"total": int(total or 0), "found": found})


def _state(environ: WSGIEnvironment, start: StartResponse) -> Body:
    """Tell what is left over in this process, seen from outside of any request."""
    pools: list[Any] = [engine.pool for engine in ENGINES]
    left: dict[str, object] = {
        "current scope": int(find_scope() is not None),
        "open Sessions": sum(
            len(open_sessions(registry)) for registry in (BANK, BRANCH, BANK_2, BRANCH_2)
        ),
        "connections checked out": sum(pool.checkedout() for pool in pools),
    }
    state: dict[str, object] = {"pid": os.getpid(), "threads": threading.active_count()}
    if environ["QUERY_STRING"]:  # it takes a tenth of a second
        gc.collect()
        objects = gc.get_objects()
        # One that is over may live on in the traceback of the last error of a thread.
        scopes = [each for each in objects if isinstance(each, Scope)]
        left["open scopes"] = sum(
            each.environ is not None or bool(each.sessions) for each in scopes
        )
        state |= {"objects": len(objects), "memory": _memory()}
    return _json(start, {**state, "left": {name: left[name] for name in left if left[name]}})


def _memory() -> int:
    """Return the megabytes that this process has in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() >> 20


def _json(start: StartResponse, value: object) -> Body:
    body = json.dumps(value).encode()
    start("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]


def _sorry(environ: WSGIEnvironment, start: StartResponse) -> Body:
    start("503 Service Unavailable", [PLAIN, ("Content-Length", "10")])
    return [b"not saved\n"]


VIEWS = _views(BANK, BRANCH)
KEYED = Idempotency(VIEWS, BANK, KEYS, principal=lambda environ: "client")
RETRY: dict[str, Any] = {"attempts": 4, "timeout": 5, "backoff": 0.02, "retry_connect": True}
MOUNTS: dict[str, WSGIApplication] = {
    "plain": SessionMiddleware(VIEWS, BANK, BRANCH),
    "headers": SessionMiddleware(VIEWS, BANK, BRANCH, commit_on="headers"),
    "answered": SessionMiddleware(VIEWS, BANK, BRANCH, commit_error=_sorry),
    "retry": RetryMiddleware(SessionMiddleware(VIEWS, BANK, BRANCH), **RETRY),
    "keys": RetryMiddleware(SessionMiddleware(KEYED, BANK, BRANCH), **RETRY),
    "two-phase": SessionMiddleware(_views(BANK_2, BRANCH_2), BANK_2, BRANCH_2),
    "read": SessionMiddleware(_read, BANK),
    "state": _state,
}
MOUNTS |= controls.mounts(CONTROL, _views, BANK, BRANCH)


def dispatch(environ: WSGIEnvironment, start_response: StartResponse) -> Body:
    """Dispatch by the first part of the path."""
    return MOUNTS[environ["PATH_INFO"].split("/")[1]](environ, start_response)


application: WSGIApplication = dispatch
if server := os.environ.get("SOAK_GREENLETS"):
    from tests.soak.greenlets import Impatient

    # gunicorn answers what is not an Exception by an error page, even in the midst of a body: a
    # client may take the two for one whole response. No middleware can keep it from that.
    application = Impatient(dispatch, interrupts=not server.startswith("gunicorn"))
