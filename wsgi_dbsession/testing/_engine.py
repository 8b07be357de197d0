"""The engine and the connections that replace the application's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, event
from sqlalchemy.engine.base import OptionEngine

from wsgi_dbsession._spoiled import check_commit

from ._savepoints import IsolatedTransaction

if TYPE_CHECKING:
    from sqlalchemy import Engine, RootTransaction, TwoPhaseTransaction
    from sqlalchemy.pool import PoolProxiedConnection

    from ._savepoints import Savepoint
    from ._shared import SharedConnection

# Options that apply from the begin of a transaction: the outer one has already begun.
_FIXED = ("isolation_level", "postgresql_readonly", "postgresql_deferrable")


class IsolatedEngine(OptionEngine):
    """An engine on the shared connection, with the options and listeners of the original."""

    def __init__(
        self, engine: Engine, shared: SharedConnection, options: dict[str, Any] | None = None
    ) -> None:
        super().__init__(engine, options or {})
        self.shared = shared

    def connect(self) -> Connection:
        """Return a Connection whose transactions are savepoints."""
        return IsolatedConnection(self)

    def execution_options(self, **opt: Any) -> IsolatedEngine:
        """Return an engine with other options on the same shared connection."""
        return IsolatedEngine(self, self.shared, _without_fixed(opt))

    def raw_connection(self) -> Any:
        """Refuse to return a connection outside of the isolation.

        :raises RuntimeError: always.
        """
        msg = (
            "raw_connection() must not be called here, because it returns a connection outside of "
            "the isolation: call cursor() of Session.connection().connection, and leave the "
            "commit to Session.commit()"
        )
        raise RuntimeError(msg)


class IsolatedConnection(Connection):
    """A Connection whose transactions are savepoints of the shared connection.

    It overrides the layer between SQLAlchemy's transaction objects and its dialects, and the
    methods that would close or replace the driver's connection.
    """

    def __init__(self, engine: IsolatedEngine) -> None:
        self.shared = engine.shared
        self.isolated = IsolatedTransaction()
        self._is_beginning = False
        # Without events, so that "engine_connect" is not called: the connection is not new.
        super().__init__(
            engine, self.shared.driver_connection(), _has_events=False, _allow_revalidate=False
        )
        event.listen(self, "before_cursor_execute", _before_cursor_execute)
        event.listen(self, "after_cursor_execute", _after_cursor_execute)
        dispatch: Any = self.dispatch
        self.dispatch = dispatch._join(engine.dispatch)

    @property
    def connection(self) -> PoolProxiedConnection:
        """The driver's connection, on which the application may write without this class."""
        if not self._is_beginning:
            self.shared.before_driver(self.isolated)
        return super().connection

    def _begin_impl(self, transaction: RootTransaction) -> None:
        self._begin()
        # SQLAlchemy's recipe for SQLite has a listener of this event that emits BEGIN.
        if self.dialect.name != "sqlite":
            self._is_beginning = True
            try:
                super()._begin_impl(transaction)
            except BaseException:
                self.shared.rollback(self.isolated)
                raise
            finally:
                self._is_beginning = False

    def _begin_twophase_impl(self, transaction: TwoPhaseTransaction) -> None:
        self.dispatch.begin_twophase(self, transaction.xid)
        self._begin()

    def _begin(self) -> None:
        self.isolated = IsolatedTransaction()
        self._named: dict[str, Savepoint] = {}
        self.shared.begin(self.isolated)

    def _commit_impl(self) -> None:
        check_commit(self)
        self.dispatch.commit(self)
        self.shared.commit(self.isolated, prepared=False)

    def _rollback_impl(self) -> None:
        self.dispatch.rollback(self)
        self.shared.rollback(self.isolated)

    def _prepare_twophase_impl(self, xid: Any) -> None:
        check_commit(self)
        self.dispatch.prepare_twophase(self, xid)
        self.shared.prepare(self.isolated)

    def _commit_twophase_impl(self, xid: Any, is_prepared: bool) -> None:
        self.dispatch.commit_twophase(self, xid, is_prepared)
        self.shared.commit(self.isolated, prepared=is_prepared)

    def _rollback_twophase_impl(self, xid: Any, is_prepared: bool) -> None:
        self.dispatch.rollback_twophase(self, xid, is_prepared)
        self.shared.rollback(self.isolated)

    def _savepoint_impl(self, name: str | None = None) -> str:
        self.dispatch.savepoint(self, name)
        savepoint = self.shared.set_savepoint(self.isolated)
        self._named[savepoint.name] = savepoint
        return savepoint.name

    def _rollback_to_savepoint_impl(self, name: str) -> None:
        self.dispatch.rollback_savepoint(self, name, None)
        self.shared.rollback_savepoint(self._named.pop(name))

    def _release_savepoint_impl(self, name: str) -> None:
        self.dispatch.release_savepoint(self, name, None)
        self.shared.release_savepoint(self._named.pop(name))

    def _execute_context(
        self, dialect: Any, constructor: Any, statement: Any, *arguments: Any, **options: Any
    ) -> Any:
        # A listener of "before_cursor_execute" would be too late: it is called with a cursor.
        if self.get_transaction() is None and not self.isolated.is_open:
            self.begin()
        with self.shared.in_use_by(self.isolated):
            self.shared.before_statement(self.isolated, statement)
            result = super()._execute_context(
                dialect, constructor, statement, *arguments, **options
            )
            try:
                self.shared.after_statement()
            except BaseException:
                result.close()
                raise
            return result

    def execution_options(self, **opt: Any) -> Connection:
        """Set options, except those of a transaction, because the outer one has begun."""
        return super().execution_options(**_without_fixed(opt))

    def has_written(self) -> bool:
        """Return whether its transaction has written something that was not rolled back.

        The database could answer only for all transactions of the isolation together.
        """
        return self.shared.has_written(self.isolated)

    def invalidate(self, exception: BaseException | None = None) -> None:
        """Invalidate the shared connection if it is broken. SQLAlchemy rolls back in any case."""
        # Without an exception, the call is a precaution after an interruption. A statement that
        # was interrupted has already called this, with its exception.
        if exception is not None:
            self.shared.loss.mark_broken()
            super().invalidate(exception)

    def close(self) -> None:
        """Roll back the transaction, and keep the driver's connection open for others."""
        try:
            transaction = self.get_transaction()
            if transaction is not None:
                transaction.close()
        finally:
            self._dbapi_connection = None


def _before_cursor_execute(
    connection: IsolatedConnection,
    cursor: object,
    statement: str,
    parameters: object,
    context: object,
    executemany: bool,
) -> None:
    connection.shared.before_cursor(statement, parameters)


def _after_cursor_execute(
    connection: IsolatedConnection,
    cursor: Any,
    statement: str,
    parameters: object,
    context: object,
    executemany: bool,
) -> None:
    connection.shared.after_cursor(connection.isolated, statement, cursor.rowcount)


def _without_fixed(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in _FIXED}
