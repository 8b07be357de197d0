"""The table's statements: claim a key and store the response, in the request's transaction."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import Insert, func, insert, select, update
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.compiler import compiles

from wsgi_dbsession._driver import codes, is_autocommit
from wsgi_dbsession._scope import current_scope

from ._problem import in_progress
from ._table import now
from ._written import Written

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Connection, Table
    from sqlalchemy.orm import Session, scoped_session

# The database refused this transaction because of a concurrent one: a new one may succeed.
_RACES = frozenset({"40001", "40P01", "1213", "1020"})
# The database gave up waiting for a concurrent transaction, which is still running.
_TIMEOUTS = frozenset({"55P03", "1205"})
# When a transaction rolls back, MariaDB refuses all but one of those that wait for its row.
_TRIES = 5


@dataclass(frozen=True, slots=True)
class Claim:
    """One request's claim to a key."""

    id: str
    key: str
    fingerprint: str
    # Distinguishes this request's row from one that another request has inserted after the
    # application rolled back this one.
    token: str = field(default_factory=lambda: secrets.token_hex(16))


@dataclass(frozen=True, slots=True)
class Stored:
    """A response as the table stores it."""

    status: str
    headers: list[tuple[str, str]]
    body: bytes | None
    """None if the response cannot be replayed."""

    def values(self) -> dict[str, Any]:
        """Return the values by column."""
        return {
            "status": self.status[:255],
            "headers": json.dumps(self.headers),
            "body": self.body,
        }


class Found(NamedTuple):
    """The row of an earlier request."""

    fingerprint: str
    status: str | None
    headers: str | None
    body: bytes | None


class Rows:
    """Reads and writes the table in the transaction of the scope's Session.

    The statements use the Session's connection directly, which triggers no autoflush and none of
    the Session's events for statements.

    :param registry: the application's registry.
    :param table: the table.
    :param wait: whether to wait for another request with the same key.
    """

    __slots__ = ("_registry", "_table", "_wait")

    def __init__(self, registry: scoped_session[Any], table: Table, wait: bool) -> None:
        self._registry = registry
        self._table = table
        self._wait = wait

    def claim(self, claim: Claim) -> Found | None:
        """Insert the row of a new key.

        If a concurrent transaction has inserted it, the database makes this one wait until that
        one ends.

        :return: None, or the committed row of an earlier request with this key.
        :raises Problem: if another request is using the key.
        :raises RuntimeError: if the connection is at AUTOCOMMIT.
        """
        session = self.session()
        # A transaction that began earlier may contain changes, so it must not be rolled back here.
        begun = session.in_transaction()
        for tries_left in reversed(range(1 if begun else _TRIES)):
            timed_out = False
            try:
                if self._insert(session, claim):
                    if not begun:
                        Written(session, self._connect(session), self._table)
                    return None
                row = self._find(session, claim)
            except IntegrityError:
                row = self._look_again(session, claim, begun)
                if row is None and not tries_left:
                    raise
            except DBAPIError as error:
                timed_out = _is_one_of(_TIMEOUTS, error)
                if not timed_out and not _is_one_of(_RACES, error):
                    raise
                if begun:
                    current_scope().doom()  # the database may have rolled it back
                    break
                row = self._look_again(session, claim, begun)
            if row is not None:
                return row
            if timed_out:
                break
        raise in_progress()

    def store(self, session: Session, claim: Claim, stored: Stored | None) -> bool:
        """Store the response in the key's row, and insert the row if it is missing.

        :param stored: None if the response is not known yet.
        :return: whether the key still belongs to this request. After a rollback by the
            application, another request may have taken it.
        """
        table = self._table
        response = {} if stored is None else stored.values()
        statement = (
            update(table)
            .where(table.c.id == claim.id, table.c.claim == claim.token)
            .values(claim=claim.token, **response)
        )
        taken = _TIMEOUTS
        try:
            if self._connect(session).execute(statement).rowcount:
                return True
            taken |= _RACES  # another request may insert the key, too
            return self._insert(session, claim, response)
        except IntegrityError:
            return False
        except DBAPIError as error:
            if _is_one_of(taken, error):
                return False
            raise

    def session(self) -> Session:
        """Return the scope's Session."""
        session: Session = self._registry()
        return session

    def owns(self, session: Any) -> bool:
        """Return whether the Session belongs to the registry and is still the scope's."""
        found: Session | None = session.dbsession_scope.sessions.get(self._registry.registry)
        return found is session

    def _connect(self, session: Session) -> Connection:
        # A Session with several binds chooses by the clause.
        return session.connection(bind_arguments={"clause": self._table})

    def _insert(
        self, session: Session, claim: Claim, response: Mapping[str, Any] | None = None
    ) -> bool:
        """Insert the row.

        :return: whether it was inserted.
        :raises IntegrityError: the row exists; on PostgreSQL, False is returned instead.
        """
        connection = self._connect(session)
        if is_autocommit(connection):
            msg = (
                "the connection must have transactions, got one at AUTOCOMMIT: the key would be "
                "committed without the work. Use an engine with another isolation level"
            )
            raise RuntimeError(msg)
        values = {
            "id": claim.id,
            "idempotency_key": claim.key,
            "fingerprint": claim.fingerprint,
            "claim": claim.token,
            "created_at": now(),
            **(response or {}),
        }
        table = self._table
        if isinstance(connection.dialect, PGDialect):
            if not self._wait and not _try_lock(connection, claim):
                return False
            # A failed INSERT would abort the transaction, and a savepoint costs two round trips.
            statement = postgresql.insert(table).on_conflict_do_nothing().returning(table.c.id)
            return connection.execute(statement, values).first() is not None
        connection.execute(insert(table) if self._wait else _NoWaitInsert(table), values)
        return True

    def _find(self, session: Session, claim: Claim, *, latest: bool = False) -> Found | None:
        columns = self._table.c
        statement = select(
            columns.fingerprint, columns.status, columns.headers, columns.body
        ).where(columns.id == claim.id)
        connection = self._connect(session)
        if isinstance(connection.dialect, PGDialect):
            # The lock gives the transaction an ID. After the COMMIT of such a transaction,
            # wsgi_dbsession.replica sets its cookie: the client of a replay reads its own write.
            statement = statement.with_for_update(read=True, key_share=True)
        elif latest:
            # At REPEATABLE READ of MariaDB, a plain SELECT reads the snapshot of the first one.
            statement = statement.with_for_update(read=True)
        row = connection.execute(statement).first()
        return None if row is None else Found(*row)

    def _look_again(self, session: Session, claim: Claim, begun: bool) -> Found | None:
        """Find the row after a failed INSERT, in a new transaction unless one had `begun`."""
        if not begun:
            session.rollback()
        return self._find(session, claim, latest=begun)


def _try_lock(connection: Connection, claim: Claim) -> bool:
    """Lock the key until the end of the transaction.

    :return: False if another transaction has locked it.
    """
    number = int.from_bytes(bytes.fromhex(claim.id[:16]), "big", signed=True)
    return bool(connection.scalar(select(func.pg_try_advisory_xact_lock(number))))


class _NoWaitInsert(Insert):
    """An INSERT that does not wait for another transaction, if the database supports it."""

    inherit_cache = True


@compiles(_NoWaitInsert, "mysql", "mariadb")
def _compile(element: _NoWaitInsert, compiler: Any, **options: Any) -> str:
    statement: str = compiler.visit_insert(element, **options)
    if compiler.dialect.is_mariadb:
        return f"SET STATEMENT innodb_lock_wait_timeout=0 FOR {statement}"
    return statement


def _is_one_of(kinds: frozenset[str], error: DBAPIError) -> bool:
    return not kinds.isdisjoint(codes(error))
