"""``Scope.released()``: no connection and no transaction for as long as a slow call takes."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

from ._place import calling_line
from ._report import log
from ._transaction import connections, has_written

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.orm import Session

# Whatever obtains a connection for a Session calls one of these. `flush` is among them because
# SQLAlchemy discards what is pending if a flush fails after it has begun.
_WAYS = ("connection", "flush", "get_bind")


class Released:
    """A block in which the Sessions of a scope hold no connection, see ``Scope.released()``.

    :param scope: a ``Scope``, which is on a floor above.
    """

    __slots__ = ("_guarded", "_scope", "place")

    def __init__(self, scope: Any) -> None:
        self._scope = scope
        self._guarded: list[tuple[Session, dict[str, Any]]] = []

    def __enter__(self) -> None:
        scope = self._scope
        self.place = calling_line()
        sessions: list[Session] = [] if scope.releases else list(scope.sessions.values())
        for session in sessions:
            self._check(session)
        try:
            scope.releases += (self,)
            for session in sessions:
                self.guard(session)
                _release(session)
        except BaseException:  # an interruption: nothing calls __exit__
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        scope = self._scope
        scope.releases = left = tuple(each for each in scope.releases if each is not self)
        if left:  # another block, in a generator that is suspended there
            left[0]._guarded += self._guarded
            return
        for session, own in self._guarded:
            for way in _WAYS:
                vars(session).pop(way, None)
            vars(session).update(own)

    def guard(self, session: Session) -> None:
        """Refuse each statement of a Session until the block ends."""
        # In the instance: a method of its class would slow down each statement of each request.
        mine = vars(session)
        self._guarded.append((session, {way: mine[way] for way in _WAYS if way in mine}))
        for way in _WAYS:
            mine[way] = partial(self._refuse, session, way, getattr(session, way))

    def _refuse(
        self, session: Session, way: str, call: Callable[..., Any], /, *args: Any, **named: Any
    ) -> Any:
        releases = self._scope.releases
        # Empty during an outcome, such as that of a response whose generator is suspended here.
        if releases and (way != "flush" or has_written(session)):
            msg = (
                f"{self._scope.name}: no statement may run in the released() block at "
                f"{releases[-1].place}, where the Session has no connection. Move the statement "
                "before or after the block, or into its own `with session_scope(Session):`"
            )
            raise RuntimeError(msg)
        return call(*args, **named)

    def _check(self, session: Any) -> None:
        """Raise if a Session has something to lose."""
        # The public `SessionTransaction.origin` is the same for a Session.begin() without `with`,
        # after which nothing waits for the end of that transaction.
        if session.in_nested_transaction() or session._trans_context_manager is not None:
            why = "a Session is in begin_nested() or `with Session.begin():`. Leave that before"
        elif wrote := has_written(session):
            why = "something was written or is pending. Write after the block, or commit before"
        elif wrote is None:
            why = (
                "whether something was written cannot be known here. Call Session.commit() or "
                "Session.rollback() before (or, for MySQL and MariaDB, grant PROCESS)"
            )
        else:
            return
        msg = f"{self._scope.name}: cannot release connections at {self.place}: {why}"
        raise RuntimeError(msg)


def _release(session: Session) -> None:
    """End a transaction that only read. Its objects stay attached, and do not expire."""
    # Session.rollback() would expire them, and Session.close() detach them. Session.commit()
    # calls listeners, which may count commits.
    transaction = session.get_transaction()
    if transaction is None:
        return
    found = connections(session)
    try:
        transaction.close()
    except BaseException as failure:
        for connection, _ in found:
            with contextlib.suppress(Exception):  # those before the failure are closed
                connection.invalidate()
        with contextlib.suppress(Exception):  # SQLAlchemy has not reached this call
            session.dispatch.after_transaction_end(session, transaction)
        if not isinstance(failure, Exception):
            raise
        log.warning("rollback failed, closing the connection instead", exc_info=True)
    if not session.autobegin:
        session.begin()  # it takes a connection at the first statement
