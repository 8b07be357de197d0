"""The rows of the table: claim a key, store the response, in the request's own transaction."""

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

# The database refused this transaction, because of another one: a new one may succeed.
_RACES = frozenset({"40001", "40P01", "1213", "1020"})
# It gave up waiting for another one, which still runs.
_TIMEOUTS = frozenset({"55P03", "1205"})
# On MariaDB a rollback makes all that wait for it lose a race but one.
_TRIES = 5


@dataclass(frozen=True, slots=True)
class Claim:
    """One request's claim to a key."""

    id: str
    key: str
    fingerprint: str
    # Tells this request's row from one that another request inserted after the application had
    # rolled back this one.
    token: str = field(default_factory=lambda: secrets.token_hex(16))


@dataclass(frozen=True, slots=True)
class Stored:
    """A response as the table has it."""

    status: str
    headers: list[tuple[str, str]]
    body: bytes | None
    """None if it cannot be replayed."""

    def values(self) -> dict[str, Any]:
        """Return the columns."""
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
    """The table, used in the transaction of the scope's Session.

    Through the Session's connection, so that its events and its autoflush are left alone.

    :param registry: the registry that has the Session.
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

        Where another transaction has inserted it, the database makes this one wait for its end.

        :return: None, or the committed row of an earlier request with this key.
        :raises Problem: if another request is using the key.
        :raises RuntimeError: if the connection is at AUTOCOMMIT.
        """
        session = self.session()
        # A transaction that was begun before may hold work: it must not be rolled back here.
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
        """Store the response in the key's row, or see to it that there is a row.

        :param stored: None if the response is not known yet.
        :return: whether the key is still this request's, which it may not be if the application
            rolled back.
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
            taken |= _RACES  # with another request that inserts the key
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
        """Return whether this is its scope's Session of the registry."""
        found: Session | None = session.dbsession_scope.sessions.get(self._registry.registry)
        return found is session

    def _connect(self, session: Session) -> Connection:
        # The clause is for a Session with several binds.
        return session.connection(bind_arguments={"clause": self._table})

    def _insert(
        self, session: Session, claim: Claim, response: Mapping[str, Any] | None = None
    ) -> bool:
        """Insert the row.

        :return: whether it was inserted: False, or an ``IntegrityError``, if it was there.
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
        connection.execute(insert(table) if self._wait else _ImpatientInsert(table), values)
        return True

    def _find(self, session: Session, claim: Claim, *, latest: bool = False) -> Found | None:
        columns = self._table.c
        statement = select(
            columns.fingerprint, columns.status, columns.headers, columns.body
        ).where(columns.id == claim.id)
        connection = self._connect(session)
        if isinstance(connection.dialect, PGDialect):
            # The lock gives the transaction an ID, and wsgi_dbsession.replica gives the client of
            # one with an ID its position: what is replayed is acknowledged once more.
            statement = statement.with_for_update(read=True, key_share=True)
        elif latest:
            # At REPEATABLE READ of MariaDB, a plain SELECT sees what there was at the first one.
            statement = statement.with_for_update(read=True)
        row = connection.execute(statement).first()
        return None if row is None else Found(*row)

    def _look_again(self, session: Session, claim: Claim, begun: bool) -> Found | None:
        """Look for the row after a failed INSERT, in a new transaction if that does no harm."""
        if not begun:
            session.rollback()
        return self._find(session, claim, latest=begun)


def _try_lock(connection: Connection, claim: Claim) -> bool:
    """Lock the key until the end of the transaction, unless another transaction has done so."""
    number = int.from_bytes(bytes.fromhex(claim.id[:16]), "big", signed=True)
    return bool(connection.scalar(select(func.pg_try_advisory_xact_lock(number))))


class _ImpatientInsert(Insert):
    """An INSERT that does not wait for another transaction, where the database supports it."""

    inherit_cache = True


@compiles(_ImpatientInsert, "mysql", "mariadb")
def _compile(element: _ImpatientInsert, compiler: Any, **options: Any) -> str:
    statement: str = compiler.visit_insert(element, **options)
    if compiler.dialect.is_mariadb:
        return f"SET STATEMENT innodb_lock_wait_timeout=0 FOR {statement}"
    return statement


def _is_one_of(kinds: frozenset[str], error: DBAPIError) -> bool:
    return not kinds.isdisjoint(codes(error))
