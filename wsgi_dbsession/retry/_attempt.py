"""One attempt: the errors that the database reported, and what was committed."""

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
"""The attempt's key in the environ of a request, or in ``Scope.info`` of a block."""

UNKNOWN = "its COMMIT may have taken place"
_COMMITTED = "it has committed"
_AUTOCOMMIT = "it used a connection at AUTOCOMMIT, which may have written"
_WITHOUT_SESSION = "it used a connection without a Session, which may have committed"


class Retry(Exception):  # noqa: N818 - it is a signal, like StopIteration
    """Raise it to run the request, or the function of :func:`run_transaction`, again.

    The request is retried even if the framework turns the exception into an error page. After the
    last attempt it propagates like any other.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        for attempt in attempts():
            attempt.reason = type(self).__name__


def is_retryable(error: BaseException) -> bool:
    """Return whether nothing was committed with this error and another attempt may succeed.

    That is true of a :class:`Retry`, of a database error with one of the
    :data:`RETRYABLE_CODES`, and of a connection that SQLAlchemy found dead when it sent a
    statement. A connection that was lost during COMMIT is not retryable: the transaction may have
    been committed.

    :param error: an exception of SQLAlchemy, or of the driver; its cause is not considered.
    """
    if isinstance(error, Retry):
        return True
    return is_lost_connection(error) or any(code in RETRYABLE_CODES for code in codes(error))


def attempts() -> list[Attempt]:
    """Return the attempts of the active scopes, from the innermost outwards."""
    # An inner request may have a copy of the outer one's environ: its attempt is then here twice.
    return [attempt for scope in scopes() if (attempt := attempt_of(scope)) is not None]


def attempt_of(scope: Scope) -> Attempt | None:
    """Return the attempt that a scope belongs to, or None."""
    holder: Mapping[str, Any] = scope.info if scope.environ is None else scope.environ
    return holder.get(KEY)


class Attempt:
    """What the database reported in one attempt, and what was committed in it.

    :param find: called with an error, describes why it is retryable, or returns None.
    :param has_next: returns whether attempts and time are left.
    :param retry_connect: whether a failure to connect is retryable.
    """

    __slots__ = (
        "_committing",
        "_connect_errors",
        "_find",
        "_has_next",
        "_is_indirect",
        "_retry_connect",
        "_without_session",
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
        has_next: Callable[[], bool],
        *,
        retry_connect: bool,
    ) -> None:
        self.reason: str | None = None  # why the last error of the database is retryable
        self.committed: str | None = None  # what was committed, or may have been
        self.unknown = False  # whether a COMMIT may have taken place
        # The id of the environ, which refers to this attempt: a reference back would be a cycle.
        self.environ: int | None = None
        # The last outcome.
        self.succeeded = self.failed_to_commit = False
        self.is_logged = False  # whether the core has logged a failed commit
        # A failed commit that the core has not logged, because another attempt was to follow.
        self.unlogged: Exception | None = None
        self._find = find
        self._has_next = has_next
        self._retry_connect = retry_connect
        self._committing = False  # from a COMMIT to its success or its error
        self._is_indirect = False  # whether the last transaction bypasses the dialect
        # Connections that left their pool, but not for a Session. Dead references count, too.
        self._without_session: tuple[weakref.ref[PoolProxiedConnection], ...] = ()
        self._connect_errors: tuple[weakref.ref[BaseException], ...] = ()

    # -- events of the core -----------------------------------------------------------------------

    def settle(self, scope: Scope) -> None:
        """Record an outcome."""
        self.failed_to_commit = scope.reason == "rolled back"
        self.succeeded = scope.outcome == "commit"
        if scope.outcome == "unknown":
            self.unknown = True
        elif scope.outcome != "rollback":
            # Even if no database was used, the on_commit hooks have run.
            self.committed = _COMMITTED

    def fail_commit(self, failure: BaseException) -> bool:
        """Record a failed commit.

        :return: whether another attempt follows, so that the core does not log the failure.
        """
        if isinstance(failure, Exception):
            # commit_error may turn the failure into a response.
            self.reason = self.reason_for(failure)
            if self.will_retry(failure):
                self.unlogged = failure
                return True
        self.is_logged = True
        return False

    def will_retry(self, error: BaseException | None) -> bool:
        """Return whether another attempt follows if this one fails now.

        :param error: the exception that was raised, None if only the response shows the failure.
        """
        return self.reason_for(error) is not None and self.obstacle() is None and self._has_next()

    # -- events of SQLAlchemy ---------------------------------------------------------------------

    def check_out(self, proxy: PoolProxiedConnection) -> None:
        """Record that a connection left its pool."""
        if is_standby(proxy.dbapi_connection):
            return  # it cannot write; Replicas queries its position without a Session
        self._without_session = (*self._without_session, weakref.ref(proxy))

    def begin(
        self, session: Session, transaction: SessionTransaction, connection: Connection
    ) -> None:
        """Record that a Session began a transaction on this connection."""
        self._is_indirect = type(connection) is not Connection
        if _has_opened(session, transaction, connection):
            proxy = connection.connection
            self._without_session = tuple(
                ref for ref in self._without_session if ref() is not proxy
            )
        self._check_autocommit(connection)

    def start_commit(self) -> None:
        """Record that a COMMIT, or a phase of a two-phase commit, is about to be sent."""
        self._committing = True

    def end_commit(self, driver: Any) -> None:
        """Record that a COMMIT took place."""
        self._committing = False
        # It commits nothing if the server has refused all writes. In a transaction, only a standby
        # is sure to do so: the application can make the transaction itself read-write.
        if not is_standby(driver) and not (autocommits(driver) and refuses_writes(driver)):
            self.committed = _COMMITTED

    def end_indirect_commit(self) -> None:
        """Record that a Session has committed on a ``Connection`` that bypasses the dialect.

        :func:`wsgi_dbsession.testing.isolate` makes such connections.
        """
        if self._is_indirect:
            self.committed = _COMMITTED

    def end_phase(self) -> None:
        """Record that a transaction was prepared, or that a prepared one was rolled back."""
        self._committing = False

    def roll_back(self, driver: Any) -> None:
        """Record a ROLLBACK, which undoes nothing if the driver is in autocommit mode."""
        if autocommits(driver) and not refuses_writes(driver):
            self.committed = _AUTOCOMMIT

    def fail(self, context: ExceptionContext) -> bool:
        """Record an error of the database.

        :return: whether it leaves the outcome of the transaction unknown.
        """
        error = context.sqlalchemy_exception or context.original_exception
        connection = context.connection
        if connection is None:
            if not context.is_pre_ping:  # after which SQLAlchemy opens another connection
                self._fail_to_connect(error)
            return False
        self._check_autocommit(connection)  # a standby may have been promoted meanwhile
        committing, self._committing = self._committing, False
        if committing:
            unknown = context.is_disconnect or not is_refusal(error)
        else:
            unknown = is_lost_commit(context)
        if unknown:
            self.unknown = True
        elif committing or context.statement is not None:
            self.note(error)
        # Otherwise a rollback failed, which an earlier error has caused.
        return unknown

    def note(self, error: BaseException) -> None:
        """Record this error as the possible cause of a failed attempt."""
        if not is_consequence(error):
            self.reason = self._find(error)

    def _fail_to_connect(self, error: BaseException) -> None:
        self.note(error)
        if self._retry_connect and self.reason is None:
            self.reason = describe_error(error)
            self._connect_errors = (*self._connect_errors, weakref.ref(error))

    def _check_autocommit(self, connection: Connection) -> None:
        """Record whether statements on this connection may commit by themselves."""
        if connection.closed or connection.invalidated or is_read_only(connection):
            return
        driver = connection.connection.dbapi_connection
        if (is_autocommit(connection) or autocommits(driver)) and not refuses_writes(driver):
            self.committed = _AUTOCOMMIT

    # -- decision ---------------------------------------------------------------------------------

    def reason_for(self, error: BaseException | None) -> str | None:
        """Describe why this failure is retryable, or return None if it is not.

        :param error: the exception that was raised, None if only the response shows the failure.
        """
        if error is None:
            return self.reason
        found = self._find(error)
        if found is not None:
            return found
        for each in chain(error):
            if is_consequence(each):
                return self.reason
            if any(ref() is each for ref in self._connect_errors):
                return describe_error(each)
        return None

    def obstacle(self) -> str | None:
        """Describe what forbids another attempt, or return None."""
        if self.unknown or self._committing:
            return UNKNOWN
        if self.committed is not None:
            return self.committed
        return _WITHOUT_SESSION if self._without_session else None


def _has_opened(session: Session, transaction: Any, connection: Connection) -> bool:
    """Return whether the Session has checked out this connection itself.

    The application may bind a Session to its own connection in three ways, of which only
    ``Session.bind`` is public.
    """
    opened: bool = transaction._connections[connection][3]
    # wsgi_dbsession.replica checks out a connection for this Session only.
    return opened or getattr(session, "_dbsession_reading", None) is connection
