"""Retry: a unit of work that lost a race runs again, and nobody notices.

Only where the database promises that nothing of the failed attempt was committed, and where the
client has not seen anything of it.
"""

from __future__ import annotations

import io
import logging
import random
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from sqlalchemy import Engine, event
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.orm import Session
from sqlalchemy.pool import Pool

from . import Observer, SessionMiddleware, find_scope, session_scope
from ._report import describe
from ._scope import scopes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import IO

    from _typeshed import OptExcInfo
    from _typeshed.wsgi import InputStream, StartResponse, WSGIEnvironment
    from sqlalchemy import Connection
    from sqlalchemy.engine import ExceptionContext
    from sqlalchemy.orm import SessionTransaction, scoped_session

    from . import Scope

__all__ = ["RETRYABLE_CODES", "Retry", "RetryMiddleware", "is_retryable", "run_transaction"]

R = TypeVar("R")

log = logging.getLogger("wsgi_dbsession")

RETRYABLE_CODES: Mapping[str, str] = MappingProxyType(
    {
        "40001": "serialization failure: standard SQL; a deadlock in SQL Server through ODBC",
        "40P01": "deadlock: PostgreSQL, YugabyteDB",
        "1213": "deadlock, or a conflict between the nodes of Galera: MySQL, MariaDB",
        "1205": "lock wait timeout: MySQL, MariaDB; deadlock: SQL Server",
        "1020": "the row has changed since it was read: MariaDB with innodb_snapshot_isolation",
        "ORA-00060": "deadlock: Oracle",
        "ORA-08177": "serialization failure: Oracle",
    }
)
"""Errors with which a database promises that nothing was committed and a new try may succeed."""

_RETRY = "wsgi_dbsession.retry"  # where an environ, or a scope's `info`, has its attempt
_SCOPE = "wsgi_dbsession.scope"
_FAILED = "%s: attempt %d of %d failed with %s; %s"
_IN_MEMORY = 1 << 16  # bytes of a request's body
_END: Any = object()  # what is got instead of a block when there is none left

# After these, PostgreSQL accepts nothing but a rollback: they say nothing about the cause.
_IN_FAILED_TRANSACTION = "25P02"

# The answer to a COMMIT that leaves open whether it took place: connection exceptions, an operator
# who ended the server's process, and 40003, "statement completion unknown".
_OPEN = ("08", "57P", "40003")

# Where the connection breaks during these, the transaction is in doubt: whoever finds that it was
# prepared may still commit it.
_TWO_PHASES = ("PREPARE TRANSACTION", "COMMIT PREPARED", "XA ")


class Retry(Exception):  # noqa: N818 - it is an order, like StopIteration
    """Raise it to have the request, or the function of :func:`run_transaction`, run again.

    It counts also where the framework turns it into an error page. After the last attempt it is
    an error like any other.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        for attempt in _attempts():
            attempt.reason = type(self).__name__


def is_retryable(error: BaseException) -> bool:
    """Say whether this error promises that nothing was committed and a new try may succeed.

    That is a :class:`Retry`, an error of the database with one of the :data:`RETRYABLE_CODES`,
    or a connection that SQLAlchemy found dead when it sent a statement. A connection that broke
    during COMMIT is none: nobody knows what became of the transaction.

    :param error: an exception of SQLAlchemy, or of the driver.
    :return: whether it is one of these; what caused it is not looked at.
    """
    if isinstance(error, Retry):
        return True
    return _is_lost_connection(error) or any(code in RETRYABLE_CODES for code in _codes(error))


def _is_lost_connection(error: BaseException) -> bool:
    return (
        isinstance(error, DBAPIError)
        and error.connection_invalidated
        and error.statement is not None
    )


def _codes(error: BaseException) -> Iterator[str]:
    """Return the codes of a database error, in the ways in which the drivers show them."""
    original: Any = error.orig if isinstance(error, DBAPIError) else error
    for name in (
        "sqlstate",  # psycopg, asyncpg, mysql-connector
        "pgcode",  # psycopg2
    ):
        code = getattr(original, name, None)
        if isinstance(code, str):
            yield code
    # PEP 249's name tells a database error from, say, an OSError, which has a number too.
    if not original.args or "DatabaseError" not in [
        kind.__name__ for kind in type(original).mro()
    ]:
        return
    first = original.args[0]
    if isinstance(first, int):  # PyMySQL, mysqlclient, mysql-connector, pymssql
        yield str(first)
    elif isinstance(first, str):  # pyodbc
        yield first[:5]
    elif isinstance(first, dict):  # pg8000
        yield str(cast("dict[str, str]", first).get("C"))
    elif isinstance(getattr(first, "code", None), int):  # oracledb, cx_Oracle
        yield f"ORA-{first.code:05}"


def _describe_error(error: BaseException) -> str:
    """Return class and code for a log line."""
    original = error.orig if isinstance(error, DBAPIError) and error.orig else error
    codes = list(_codes(error))
    what = next((code for code in codes if code in RETRYABLE_CODES), None)
    if what is None and _is_lost_connection(error):
        what = "the connection was dead"
    return type(original).__name__ + (f" ({what})" if what else "")


class _Policy(NamedTuple):
    """How often, how long, and for which errors besides those of the table."""

    attempts: int
    backoff: float
    max_backoff: float
    give_up_after: float
    also: Callable[[BaseException], bool] | None

    def check(self) -> _Policy:
        """Return this policy.

        :raises TypeError: ``also`` is not callable.
        :raises ValueError: a number is too small.
        """
        if self.attempts < 1:
            msg = f"attempts is a number from 1, not {self.attempts!r}: the first one counts"
            raise ValueError(msg)
        for name in ("backoff", "max_backoff", "give_up_after"):
            value = getattr(self, name)
            if value < 0:
                msg = f"{name} is a number of seconds, not {value!r}"
                raise ValueError(msg)
        if self.also is not None and not callable(self.also):
            msg = f"also is a callable, also(error) -> bool, or None, not {self.also!r}"
            raise TypeError(msg)
        return self

    def find(self, error: BaseException | None) -> str | None:
        """Describe what makes this error retryable, itself or what caused it, if anything does."""
        seen: set[int] = set()
        while error is not None and id(error) not in seen:
            seen.add(id(error))
            if is_retryable(error) or (self.also is not None and self.also(error)):
                return _describe_error(error)
            error = error.__cause__ or error.__context__
        return None


class _Run(ABC):
    """The attempts at one unit of work."""

    __slots__ = ("_deadline", "_delay", "attempts", "number", "policy")

    def __init__(self, policy: _Policy) -> None:
        self.policy = policy
        self.attempts = policy.attempts
        self.number = 0  # of the attempt that runs
        self._deadline = time.monotonic() + policy.give_up_after
        self._delay = 0.0

    def may_go_on(self) -> bool:
        """Say whether there are attempts left, and time."""
        return self.number < self.attempts and time.monotonic() < self._deadline

    def gives_way(self, reason: str | None, obstacle: str | None) -> bool:
        """Say whether this attempt makes way for another one, and log it.

        :param reason: what makes it worth another try, if anything does.
        :param obstacle: what forbids another try.
        """
        if reason is None:
            return False
        values = (self.describe(), self.number, self.attempts, reason)
        if obstacle is not None:
            log.info(_FAILED, *values, f"it is the last one, because {obstacle}")
            return False
        if not self.may_go_on():
            log.warning(_FAILED, *values, "it was the last one")
            return False
        policy = self.policy
        # Full jitter: see "Exponential Backoff And Jitter" in the AWS Architecture Blog.
        ceiling = min(policy.max_backoff, policy.backoff * 2.0 ** min(self.number - 1, 60))
        self._delay = min(random.uniform(0, ceiling), self._deadline - time.monotonic())
        log.info(_FAILED, *values, f"the next one begins in {self._delay:.3f} s")
        return True

    @abstractmethod
    def describe(self) -> str:
        """Return a name for the unit of work, for log lines."""

    def pause(self) -> None:
        """Wait for the others to get out of the way."""
        if self._delay > 0:
            time.sleep(self._delay)


class _Attempt:
    """One attempt: what the database said in it, and what was committed."""

    __slots__ = ("_begun", "_committing", "_loose", "commits", "reason", "run", "unknown")

    def __init__(self, run: _Run) -> None:
        self.run = run
        self.reason: str | None = None  # the last database error, if it is retryable
        self.commits = 0
        self.unknown = False  # whether a COMMIT took place
        self._begun: dict[Session, set[Connection]] | None = None
        self._committing: Session | None = None
        self._loose: set[int] | None = None  # connections that no Session has claimed

    def check_out(self, connection: object) -> None:
        """Take note of a connection that leaves the pool."""
        if self._loose is None:
            self._loose = set()
        self._loose.add(id(connection))

    def begin(self, session: Session, connection: Connection) -> None:
        """Take note of a transaction that begins."""
        if self._begun is None:
            self._begun = {}
        self._begun.setdefault(session, set()).add(connection)
        if self._loose:
            self._loose.discard(id(connection.connection.dbapi_connection))
        if _is_autocommit(connection):
            self.commits += 1

    def start_commit(self, session: Session) -> None:
        """Take note of a flush, and a COMMIT after it."""
        self._committing = session

    def end_commit(self, session: Session) -> None:
        """Take note of a COMMIT that took place."""
        self._committing = None
        self._end(session)
        self.commits += 1

    def roll_back(self, session: Session, error: BaseException | None) -> None:
        """Take note of a rollback, and of the error that is handled by it."""
        self._committing = None
        self._end(session)
        # A flush may fail with an error that is none of the database: StaleDataError.
        if error is not None and not isinstance(error, DBAPIError):
            self.note(error)

    def _end(self, session: Session) -> set[Connection] | None:
        return None if self._begun is None else self._begun.pop(session, None)

    def fail(self, context: ExceptionContext) -> bool:
        """Take note of an error of the database.

        :return: whether it leaves open what became of the transaction.
        """
        error = context.sqlalchemy_exception or context.original_exception
        session = self._committing
        if context.connection is None:  # there was no way to connect
            self.note(error)
        elif context.statement is not None:
            self._committing = None  # a flush failed, so that no COMMIT was sent
            if context.is_disconnect and context.statement.startswith(_TWO_PHASES):
                self.unknown = True
                return True
            self.note(error)
        elif session is not None:
            self._committing = None
            if not _is_refusal(context):
                self.unknown = True
                return True
            if len(self._end(session) or ()) > 1:
                self.commits += 1  # perhaps: the other connections of this Session
            self.note(error)
        # Else a rollback failed: that is a consequence.
        return False

    def note(self, error: BaseException) -> None:
        """Keep what this error says about the cause of the failure that it may lead to."""
        if not _is_consequence(error):
            self.reason = self.run.policy.find(error)

    def why(self, error: BaseException | None) -> str | None:
        """Describe what makes this failure worth another try, if anything does.

        :param error: what was raised; None where the failure shows in the response only.
        """
        found = self.run.policy.find(error)
        if found is None and (error is None or _is_consequence(error)):
            return self.reason
        return found

    def obstacle(self) -> str | None:
        """Say what forbids another try, if anything does."""
        if self.unknown:
            return "it is unknown whether its COMMIT took place"
        if self.commits:
            return "something was committed in it"
        if self._loose:
            return "it used a connection without a Session, which may have committed"
        return None


def _is_consequence(error: BaseException) -> bool:
    """Say whether this error says only that an earlier one was not followed by a rollback."""
    return isinstance(error, PendingRollbackError) or _IN_FAILED_TRANSACTION in _codes(error)


def _is_refusal(context: ExceptionContext) -> bool:
    """Say whether the database answered a COMMIT, and answered no."""
    error = context.sqlalchemy_exception
    return (
        isinstance(error, DBAPIError)
        and not context.is_disconnect
        and not any(code.startswith(_OPEN) for code in _codes(error))
    )


def _is_autocommit(connection: Connection) -> bool:
    """Say whether the statements of this connection commit by themselves, and may write."""
    options = connection.get_execution_options()
    level = options.get("isolation_level")
    if level is None:
        # What create_engine(isolation_level=...) was told: no public name has it.
        level = getattr(connection.dialect, "_on_connect_isolation_level", None)
    return level == "AUTOCOMMIT" and not options.get("postgresql_readonly")


def _attempts() -> list[_Attempt]:
    """Return the attempts that are made here, the innermost first."""
    found: list[_Attempt] = []
    for scope in scopes():
        holder: Mapping[str, Any] = scope.info if scope.environ is None else scope.environ
        attempt = holder.get(_RETRY)
        # A request in a request may have got a copy of its environ.
        if attempt is not None and attempt not in found:
            found.append(attempt)
    return found


def _listen() -> None:
    """Hear of errors, commits and connections from everywhere, also from where no registry is.

    Not by the events of connections, which tell of COMMIT: whoever listens to one of them slows
    down every statement.
    """
    if event.contains(Session, "after_commit", _on_commit):
        return
    event.listen(Engine, "handle_error", _on_error)
    event.listen(Pool, "checkout", _on_checkout)
    event.listen(Session, "after_begin", _on_begin)
    event.listen(Session, "before_commit", _before_commit)
    event.listen(Session, "after_soft_rollback", _on_rollback)
    event.listen(Session, "after_commit", _on_commit)


def _on_checkout(connection: object, _record: object, _proxy: object) -> None:
    for attempt in _attempts():
        attempt.check_out(connection)


def _on_begin(session: Session, _: object, connection: Connection) -> None:
    for attempt in _attempts():
        attempt.begin(session, connection)


def _before_commit(session: Session) -> None:
    if not session.in_nested_transaction():
        for attempt in _attempts():
            attempt.start_commit(session)


def _on_commit(session: Session) -> None:
    if not session.in_nested_transaction():
        for attempt in _attempts():
            attempt.end_commit(session)


def _on_rollback(session: Session, transaction: SessionTransaction) -> None:
    if not transaction.nested:
        error = sys.exc_info()[1]
        for attempt in _attempts():
            attempt.roll_back(session, error)


def _on_error(context: ExceptionContext) -> None:
    unknown = [attempt for attempt in _attempts() if attempt.fail(context)]
    if unknown:
        if isinstance(context.sqlalchemy_exception, DBAPIError):
            context.sqlalchemy_exception.add_detail("It is unknown whether the COMMIT took place.")
        log.error(
            "%s: it is unknown whether its COMMIT took place, so it is not run again: %s",
            unknown[0].run.describe(),
            context.original_exception,
        )


# -- outside of requests --------------------------------------------------------------------------


class _Call(_Run):
    """The attempts of :func:`run_transaction`."""

    __slots__ = ("_function",)

    def __init__(self, policy: _Policy, function: Callable[[], object]) -> None:
        super().__init__(policy)
        self._function = function

    def describe(self) -> str:
        return f"{getattr(self._function, '__qualname__', self._function)}()"


def run_transaction(
    function: Callable[[], R],
    *registries: scoped_session[Any],
    attempts: int = 3,
    backoff: float = 0.05,
    max_backoff: float = 1.0,
    give_up_after: float = 10.0,
    also: Callable[[BaseException], bool] | None = None,
) -> R:
    """Call a function in a ``session_scope`` block of its own, and again if it lost a race.

    ::

        def transfer() -> None:
            Session.get_one(Account, 1).balance -= 10
            Session.get_one(Account, 2).balance += 10

        run_transaction(transfer, Session)

    It may be called several times, so what it does besides working on the database should wait
    for the commit: see :meth:`Scope.on_commit`.

    :param function: what to call, without arguments.
    :param registries: see :class:`session_scope`.
    :param attempts: see :class:`RetryMiddleware`, as for the other arguments.
    :return: what the function returned in the attempt that was committed.
    :raises TypeError: the function would run after the block has ended (a generator or coroutine
        function), or see :class:`session_scope`.
    :raises ValueError: see :class:`session_scope` and :class:`RetryMiddleware`.
    :raises BaseException: what the last attempt raised.
    """
    policy = _Policy(attempts, backoff, max_backoff, give_up_after, also).check()
    block = session_scope(*registries)
    block(function)  # refuses what it could not run inside of the block
    _listen()
    call = _Call(policy, function)
    while True:
        call.number += 1
        attempt = _Attempt(call)
        try:
            with block as scope:
                scope.info[_RETRY] = attempt
                return function()
        except Exception as error:
            if not call.gives_way(attempt.why(error), attempt.obstacle()):
                raise
        call.pause()


# -- requests -------------------------------------------------------------------------------------


class RetryMiddleware:
    """Run a request again when it lost a race, as if the first attempt had never been.

    ::

        app.wsgi_app = RetryMiddleware(SessionMiddleware(app.wsgi_app, Session))

    A request is run again when its error, or the last database error before its error page (a
    response with status 4xx or 5xx), :func:`is_retryable`. Never when a block of the response was
    handed on, when anything was committed in it, or when the connection broke during COMMIT.

    Each attempt gets a copy of the environ as it was before the first, with a body that begins
    anew, and with ``environ["wsgi_dbsession.attempt"]``, counted from 1, and
    ``environ["wsgi_dbsession.attempts"]``, the number of the last one. Hooks of
    :meth:`Scope.on_commit` run for the attempt that is committed, those of
    :meth:`Scope.on_rollback` for each that is rolled back.

    :param app: the :class:`SessionMiddleware`. Other middleware goes around this one, or inside
        of that one.
    :param attempts: how often a request is run at most.
    :param max_body: a request with a longer body, in bytes, is run once.
    :param backoff: the second attempt begins after a random delay of at most this many seconds;
        the limit doubles with each further one.
    :param max_backoff: the largest limit of that delay.
    :param give_up_after: no attempt begins later than this many seconds after the first.
    :param also: called with an error that is in no table, returns whether to retry it. It answers
        for the promise that nothing was committed.
    :raises TypeError: the application is no :class:`SessionMiddleware`, or ``also`` is not
        callable.
    :raises ValueError: a number is too small.
    """

    def __init__(
        self,
        app: SessionMiddleware,
        *,
        attempts: int = 3,
        max_body: int = 1 << 20,
        backoff: float = 0.05,
        max_backoff: float = 1.0,
        give_up_after: float = 10.0,
        also: Callable[[BaseException], bool] | None = None,
    ) -> None:
        kind: type = type(app)  # of which the annotation knows only what it should be
        if not issubclass(kind, SessionMiddleware):
            msg = (
                f"RetryMiddleware goes directly around SessionMiddleware, not around {app!r}: "
                "`RetryMiddleware(SessionMiddleware(app, Session))`. Other middleware goes around "
                "both, or inside of both"
            )
            raise TypeError(msg)
        if max_body < 0:
            msg = f"max_body is a number of bytes, not {max_body!r}"
            raise ValueError(msg)
        self.app = app
        app.observers += (_Observer(),)
        self._max_body = max_body
        self._policy = _Policy(attempts, backoff, max_backoff, give_up_after, also).check()
        _listen()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Handle one request."""
        scope = find_scope()
        if scope is not None and scope.environ is environ:
            if _RETRY in environ:
                return self.app(environ, start_response)  # the outermost one decides
            msg = (
                "RetryMiddleware is inside of a SessionMiddleware, so it cannot undo an attempt: "
                "put it around the outermost, `RetryMiddleware(SessionMiddleware(app, Session))`"
            )
            raise RuntimeError(msg)
        request = _Request(self._policy, self.app, environ, start_response, self._max_body)
        return request.respond()


class _Observer(Observer):
    """Keeps the failure of a commit that is tried again out of the log."""

    def commit_failed(self, scope: Scope, failure: BaseException) -> bool:
        attempt = (scope.environ or {}).get(_RETRY)
        return attempt is not None and attempt.will_retry(scope, failure)


class _Start(_Attempt):
    """An attempt at a request: its start_response, which is held until it is final."""

    __slots__ = (
        "_exc_info",
        "_headers",
        "_server",
        "_write",
        "released",
        "request",
        "scope",
        "status",
    )

    def __init__(self, request: _Request, start_response: StartResponse) -> None:
        super().__init__(request)
        self.request = request
        self.scope: Scope | None = None
        self.status: str | None = None
        self.released = False
        self._exc_info: OptExcInfo | None = None
        self._server = start_response

    def __call__(
        self, status: str, headers: list[tuple[str, str]], exc_info: OptExcInfo | None = None, /
    ) -> Callable[[bytes], object]:
        if self.status is not None and exc_info is None:
            self.release()  # the server says what it thinks of a second call
        self.status = status
        self._headers = headers
        self._exc_info = exc_info
        if self.released:
            self._hand_on()
        return self.write

    def release(self) -> None:
        """Hand the start on to the server, as soon as there is one: this attempt is final."""
        if not self.released:
            self.released = True
            if self.status is not None:
                self._hand_on()

    def _hand_on(self) -> None:
        assert self.status is not None
        exc_info, self._exc_info = self._exc_info, None
        if exc_info is None:
            self._write = self._server(self.status, self._headers)
            return
        try:
            self._write = self._server(self.status, self._headers, exc_info)
        finally:
            exc_info = None  # a traceback that refers to this frame is a cycle

    def write(self, block: bytes, /) -> None:
        """Hand a block on at once, as the write callable of PEP 3333 does."""
        self.release()
        self._write(block)

    def fails(self) -> bool:
        """Say whether this attempt failed, by its response, and makes way for another one."""
        scope = self.scope
        if scope is None or scope.outcome == "commit":
            return False
        is_error_page = self.status is not None and self.status[:1] in "45"
        if not is_error_page and scope.failure is None:
            return False
        return self.run.gives_way(self.why(None), self.obstacle())

    def gives_way_to(self, error: Exception) -> bool:
        """Say whether this attempt failed with this error, and makes way for another one."""
        scope = self.scope
        if scope is None or scope.outcome == "commit":
            return False
        return self.run.gives_way(self.why(error), self.obstacle())

    def obstacle(self) -> str | None:
        """Say what forbids another try, if anything does."""
        if self.released:
            return "a part of its response was handed on"
        if self.request.has_lost_body():
            return "its body is longer than max_body"
        return super().obstacle()

    def will_retry(self, scope: Scope, failure: BaseException) -> bool:
        """Say whether another attempt follows this failure of the commit. The core asks."""
        for outer in scopes():
            if outer is not scope and outer.environ and outer.environ.get(_RETRY) is self:
                return False  # a request inside of this one, with a copy of its environ
        return (
            isinstance(failure, Exception)
            and self.why(failure) is not None
            and self.obstacle() is None
            and self.run.may_go_on()
        )


class _Request(_Run):
    """The attempts at one request. It does not know them: they know it."""

    __slots__ = ("_app", "_body", "_environ", "_server")

    def __init__(
        self,
        policy: _Policy,
        app: SessionMiddleware,
        environ: WSGIEnvironment,
        start_response: StartResponse,
        max_body: int,
    ) -> None:
        super().__init__(policy)
        self._app = app
        self._environ = environ
        self._server = start_response
        self._body: _Body | None = None
        length = environ.get("CONTENT_LENGTH")
        if length and length.isdecimal() and int(length) > max_body:
            self.attempts = 1
        else:
            self._body = _Body(environ["wsgi.input"], max_body)

    def describe(self) -> str:
        return describe(self._environ)

    def has_lost_body(self) -> bool:
        """Say whether no other attempt could read the body again."""
        return self._body is None or self._body.is_lost()

    def respond(self) -> Iterable[bytes]:
        """Run the application until an attempt is final, and hand it on."""
        while True:
            self.number += 1
            environ = self._environ.copy()
            attempt = environ[_RETRY] = _Start(self, self._server)
            environ["wsgi_dbsession.attempt"] = self.number
            environ["wsgi_dbsession.attempts"] = self.attempts
            if self._body is not None:
                environ["wsgi.input"] = self._body
            result: Iterable[bytes] = ()
            blocks: Iterator[bytes] | None = None
            block = _END
            try:
                try:
                    result = self._app(environ, attempt)
                finally:
                    scope = attempt.scope = environ.get(_SCOPE)
                if scope is not None and scope.environ is not None:
                    # The request is not over: its first block tells more.
                    blocks = iter(result)
                    block = next(blocks, _END)
                if not attempt.fails():
                    attempt.release()
                    if blocks is None:
                        return result
                    return _Response(attempt, result, block, blocks)
            except BaseException as error:
                _close_failed(result)
                if not isinstance(error, Exception) or not attempt.gives_way_to(error):
                    raise
            else:
                _close_failed(result)
                if attempt.obstacle() is not None:
                    # It committed something in its close(), so this is all there will be.
                    attempt.release()
                    return [] if block is _END else [block]
            assert self._body is not None, "what cannot be read again is an obstacle"
            self._body.rewind()
            self.pause()


class _Response:
    """The body: the iterable that the server gets where application code is left to run."""

    __slots__ = ("_ahead", "_attempt", "_blocks", "_iterable")

    def __init__(
        self, attempt: _Start, iterable: Iterable[bytes], ahead: bytes, blocks: Iterator[bytes]
    ) -> None:
        self._attempt = attempt
        self._iterable = iterable
        self._ahead: bytes | None = ahead
        self._blocks = blocks

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        block, self._ahead = self._ahead, None
        try:
            if block is None:
                block = next(self._blocks, _END)
        except Exception as error:
            self._attempt.gives_way_to(error)  # it does not, and the log says why
            raise
        if block is _END:
            raise StopIteration
        return block

    def close(self) -> None:
        _close(self._iterable)


def _close(iterable: Iterable[bytes]) -> None:
    close = getattr(iterable, "close", None)
    if close is not None:
        close()


def _close_failed(iterable: Iterable[bytes]) -> None:
    try:
        _close(iterable)
    except Exception:
        log.warning("closing the response of a failed attempt failed", exc_info=True)


class _Body:
    """The request's body: what an attempt has read of it, the next one reads again.

    Nothing is read ahead: a body that nobody reads stays where it is.
    """

    __slots__ = ("_ended", "_file", "_max_body", "_position", "_size", "_source")

    def __init__(self, source: InputStream, max_body: int) -> None:
        self._source = source
        self._max_body = max_body
        self._file: IO[bytes] | None = None
        self._size = 0
        self._position = 0
        self._ended = False

    def rewind(self) -> None:
        """Begin anew."""
        self._position = 0

    def is_lost(self) -> bool:
        """Say whether more was read than could be kept."""
        return self._size > self._max_body

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            return self._replay("read") + self._record(self._source.read)
        kept = self._replay("read", size)
        return kept + self._record(self._source.read, size - len(kept))

    def readline(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            kept = self._replay("readline")
            return kept if kept[-1:] == b"\n" else kept + self._record(self._source.readline)
        kept = self._replay("readline", size)
        if kept[-1:] == b"\n":
            return kept
        return kept + self._record(self._source.readline, size - len(kept))

    def readlines(self, hint: int | None = -1, /) -> list[bytes]:
        lines: list[bytes] = []
        total = 0
        for line in self:
            lines.append(line)
            total += len(line)
            if hint is not None and 0 < hint <= total:
                break
        return lines

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.readline, b"")

    def _replay(self, method: str, *size: int) -> bytes:
        """Read again what an earlier attempt has read."""
        if self._file is None or self._position == self._size:
            return b""
        self._file.seek(self._position)
        block: bytes = getattr(self._file, method)(*size)
        self._position += len(block)
        return block

    def _record(self, read: Callable[..., bytes], *size: int) -> bytes:
        """Read on, and keep it."""
        if self._ended or size == (0,):
            return b""
        block = read(*size)
        if not block:
            # Not asked again: on some servers that would wait for the next request.
            self._ended = True
            return block
        if not self.is_lost():
            self._size += len(block)
            self._position = self._size
            if self.is_lost():
                self._drop()
            else:
                if self._file is None:
                    self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115 - see __del__
                self._file.seek(0, io.SEEK_END)
                self._file.write(block)
        return block

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def __del__(self) -> None:
        self._drop()
