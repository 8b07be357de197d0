"""One attempt: what the database reported in it, and what it committed."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection

from wsgi_dbsession._driver import (
    autocommits,
    codes,
    is_autocommit,
    is_read_only,
    is_refusal,
)
from wsgi_dbsession._step import scopes

from ._codes import (
    RETRYABLE_CODES,
    chain,
    describe_error,
    is_consequence,
    is_lost_commit,
    is_lost_connection,
)
from ._drivers import is_standby, refuses_writes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sqlalchemy.engine import ExceptionContext
    from sqlalchemy.orm import Session, SessionTransaction
    from sqlalchemy.pool import PoolProxiedConnection

    from wsgi_dbsession._scope import Scope

KEY = "wsgi_dbsession.retry"
"""Where an environ, or the ``info`` of a block, has its attempt."""

UNKNOWN = "its COMMIT may have taken place"
_COMMITTED = "it has committed"
_AUTOCOMMIT = "it used a connection at AUTOCOMMIT, which may have written"
_LOOSE = "it used a connection without a Session, which may have committed"


class Retry(Exception):  # noqa: N818 - it is an order, like StopIteration
    """Raise it to run the request, or the function of :func:`run_transaction`, again.

    It counts even if the framework turns it into an error page. After the last attempt it is an
    error like any other.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        for attempt in attempts():
            attempt.reason = type(self).__name__


def is_retryable(error: BaseException) -> bool:
    """Return whether this error promises that nothing was committed and a new try may succeed.

    That is a :class:`Retry`, an error of the database with one of the :data:`RETRYABLE_CODES`, or
    a connection that SQLAlchemy found dead when it sent a statement. A connection that was lost
    during COMMIT is not retryable: the transaction may have been committed.

    :param error: an exception of SQLAlchemy, or of the driver.
    :return: whether it is one of these; what caused it is not looked at.
    """
    if isinstance(error, Retry):
        return True
    return is_lost_connection(error) or any(code in RETRYABLE_CODES for code in codes(error))


def attempts() -> list[Attempt]:
    """Return the attempts that are made here, the innermost first."""
    # A request in a request may have got a copy of its environ: then one attempt is here twice.
    return [attempt for scope in scopes() if (attempt := attempt_of(scope)) is not None]


def attempt_of(scope: Scope) -> Attempt | None:
    """Return the attempt that a scope is, or is in."""
    holder: Mapping[str, Any] = scope.info if scope.environ is None else scope.environ
    return holder.get(KEY)


class Attempt:
    """What the database reported in one attempt, and what was committed in it.

    :param find: describes what makes an error retryable, if anything does.
    :param may_go_on: returns whether there are attempts left.
    :param retry_connect: whether a failure to connect is retryable.
    """

    __slots__ = (
        "_committing",
        "_find",
        "_is_indirect",
        "_loose",
        "_may_go_on",
        "_refused",
        "_retry_connect",
        "committed",
        "environ",
        "failed_to_commit",
        "is_logged",
        "reason",
        "succeeded",
        "unknown",
        "unlogged",
    )

    def __init__(
        self,
        find: Callable[[BaseException], str | None],
        may_go_on: Callable[[], bool],
        *,
        retry_connect: bool,
    ) -> None:
        self.reason: str | None = None  # what makes the last error of the database retryable
        self.committed: str | None = None  # how, if anything was
        self.unknown = False  # whether a COMMIT took place
        # The id of the request's environ, which has this attempt: a reference would be a cycle.
        self.environ: int | None = None
        # What the core says of the outcome.
        self.succeeded = self.failed_to_commit = False
        self.is_logged = False
        # The failure of a commit that the core does not log, as another attempt is to follow.
        self.unlogged: Exception | None = None
        self._find = find
        self._may_go_on = may_go_on
        self._retry_connect = retry_connect
        self._committing = False  # from a COMMIT to its success, or to the report of its failure
        self._is_indirect = False
        # Left the pool, but not for a Session. What is dead already counts: it was used.
        self._loose: tuple[weakref.ref[PoolProxiedConnection], ...] = ()
        self._refused: tuple[weakref.ref[BaseException], ...] = ()

    # -- what the core tells ----------------------------------------------------------------------

    def settle(self, scope: Scope) -> None:
        """Record an outcome."""
        self.failed_to_commit = scope.reason == "rolled back"
        self.succeeded = scope.outcome == "commit"
        if scope.outcome == "unknown":
            self.unknown = True
        elif scope.outcome != "rollback":
            # Even if no database was used: the hooks have run.
            self.committed = _COMMITTED

    def will_retry(self, scope: Scope, failure: BaseException) -> bool:
        """Return whether another attempt follows this failed commit."""
        if isinstance(failure, Exception):
            # If commit_error answers, nothing else shows the failure.
            self.reason = self.why(failure)
            if self.is_followed(failure):
                self.unlogged = failure
                return True
        self.is_logged = True  # by the core
        return False

    def is_followed(self, error: BaseException | None) -> bool:
        """Return whether another attempt follows, now that this one fails.

        :param error: what was raised; None where the failure shows in the response only.
        """
        return self.why(error) is not None and self.obstacle() is None and self._may_go_on()

    # -- what SQLAlchemy tells --------------------------------------------------------------------

    def check_out(self, proxy: PoolProxiedConnection) -> None:
        """Record that a connection left its pool."""
        if is_standby(proxy.dbapi_connection):
            return  # where a replica was asked how far it is, say
        self._loose = (*self._loose, weakref.ref(proxy))

    def begin(
        self, session: Session, transaction: SessionTransaction, connection: Connection
    ) -> None:
        """Record that a Session began a transaction on this connection."""
        self._is_indirect = type(connection) is not Connection
        if _has_opened(session, transaction, connection):
            proxy = connection.connection
            self._loose = tuple(ref for ref in self._loose if ref() is not proxy)
        self._see_autocommit(connection)

    def start_commit(self) -> None:
        """Record that a COMMIT, or a phase of one, is sent now."""
        self._committing = True

    def end_commit(self, driver: Any) -> None:
        """Record that a COMMIT took place."""
        self._committing = False
        # At AUTOCOMMIT it commits nothing: what was written is committed already.
        if not is_standby(driver) and not (autocommits(driver) and refuses_writes(driver)):
            self.committed = _COMMITTED

    def end_indirect_commit(self) -> None:
        """Record that a Session has committed, for a ``Connection`` that commits in its own way.

        Those of :func:`wsgi_dbsession.testing.isolate` do not ask the dialect.
        """
        if self._is_indirect:
            self.committed = _COMMITTED

    def end_phase(self) -> None:
        """Record that a first phase, or the undoing of one, took place."""
        self._committing = False

    def roll_back(self, driver: Any) -> None:
        """Record a ROLLBACK, which undoes nothing if the driver was told to commit by itself."""
        if autocommits(driver) and not refuses_writes(driver):
            self.committed = _AUTOCOMMIT

    def fail(self, context: ExceptionContext) -> bool:
        """Record an error of the database.

        :return: whether it leaves open what became of the transaction.
        """
        error = context.sqlalchemy_exception or context.original_exception
        connection = context.connection
        if connection is None:
            self._fail_to_connect(error)
            return False
        self._see_autocommit(connection)  # a standby may have been promoted meanwhile
        committing, self._committing = self._committing, False
        if committing:
            unknown = context.is_disconnect or not is_refusal(error)
        else:
            unknown = is_lost_commit(context)
        if unknown:
            self.unknown = True
        elif committing or context.statement is not None:
            self.note(error)
        # Else a rollback failed: that is a consequence.
        return unknown

    def note(self, error: BaseException) -> None:
        """Keep what this error says about the cause of the failure that it may lead to."""
        if not is_consequence(error):
            self.reason = self._find(error)

    def _fail_to_connect(self, error: BaseException) -> None:
        self.note(error)
        if self._retry_connect and self.reason is None:
            self.reason = describe_error(error)
            self._refused = (*self._refused, weakref.ref(error))

    def _see_autocommit(self, connection: Connection) -> None:
        """Record that statements commit by themselves, if they do."""
        if connection.closed or connection.invalidated or is_read_only(connection):
            return
        driver = connection.connection.dbapi_connection
        if (is_autocommit(connection) or autocommits(driver)) and not refuses_writes(driver):
            self.committed = _AUTOCOMMIT

    # -- what it comes to -------------------------------------------------------------------------

    def why(self, error: BaseException | None) -> str | None:
        """Describe what makes this failure retryable, if anything does.

        :param error: what was raised; None where the failure shows in the response only.
        """
        if error is None:
            return self.reason
        found = self._find(error)
        if found is not None:
            return found
        for each in chain(error):
            if is_consequence(each):
                return self.reason
            if any(ref() is each for ref in self._refused):
                return describe_error(each)
        return None

    def obstacle(self) -> str | None:
        """Return what forbids another attempt, if anything does."""
        if self.unknown or self._committing:
            return UNKNOWN
        if self.committed is not None:
            return self.committed
        return _LOOSE if self._loose else None


def _has_opened(session: Session, transaction: Any, connection: Connection) -> bool:
    """Return whether a Session has opened this connection, rather than got it from elsewhere.

    It may be bound to one in three ways, of which only ``Session.bind`` is public.
    """
    opened: bool = transaction._connections[connection][3]
    # wsgi_dbsession.replica opens one for the Session alone.
    return opened or getattr(session, "_dbsession_reading", None) is connection
