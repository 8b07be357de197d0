"""The deferred constraints: COMMIT checks them, but the release of a savepoint does not."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import TYPE_CHECKING, Any

from sqlalchemy import exc

if TYPE_CHECKING:
    from collections.abc import Generator

    from sqlalchemy import Connection

_DEFERRABLE = """
    SELECT pg_constraint.oid, quote_ident(nspname) || '.' || quote_ident(conname), condeferred,
        contype::text
    FROM pg_constraint JOIN pg_namespace ON pg_namespace.oid = connamespace WHERE condeferrable
"""
_ORPHANS = """
    SELECT 'SELECT ROW(' || string_agg('c.' || quote_ident(child.attname), ', ')
        || ')::text FROM ' || conrelid::regclass || ' AS c WHERE '
        || string_agg('c.' || quote_ident(child.attname) || ' IS NOT NULL', ' AND ')
        || ' AND NOT EXISTS (SELECT FROM ' || confrelid::regclass || ' AS p WHERE '
        || string_agg('p.' || quote_ident(parent.attname) || ' = c.' || quote_ident(child.attname),
            ' AND ')
        || ')'
    FROM pg_constraint, unnest(conkey, confkey) AS key (child, parent)
    JOIN pg_attribute AS child ON child.attnum = key.child
    JOIN pg_attribute AS parent ON parent.attnum = key.parent
    WHERE pg_constraint.oid = {oid} AND child.attrelid = conrelid AND parent.attrelid = confrelid
    GROUP BY conrelid, confrelid
"""
_DUPLICATES = """
    SELECT 'SELECT ROW(' || string_agg(quote_ident(attname), ', ') || ')::text FROM '
        || conrelid::regclass || ' WHERE '
        || string_agg(quote_ident(attname) || ' IS NOT NULL', ' AND ')
        || ' GROUP BY ' || string_agg(quote_ident(attname), ', ') || ' HAVING count(*) > 1'
    FROM pg_constraint, unnest(conkey) AS key (number)
    JOIN pg_attribute ON attnum = key.number
    WHERE pg_constraint.oid = {oid} AND attrelid = conrelid
    GROUP BY conrelid
"""
# By the kind of constraint. Exclusion constraints and triggers have no such query.
_VIOLATIONS = {"f": _ORPHANS, "u": _DUPLICATES, "p": _DUPLICATES}
_DEFERRED_TABLES = "SELECT name FROM sqlite_master WHERE type = 'table' AND sql LIKE '%DEFERRED%'"


class DeferredConstraints:
    """The deferred constraints of a database, by default none."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def _execute(self, statement: str) -> Any:
        # Without parameters, so that a percent sign in a name is not a placeholder.
        return self._connection.exec_driver_sql(
            statement, execution_options={"no_parameters": True}
        )

    def find(self) -> Counter[Any]:
        """Return the current violations. Nothing is changed."""
        return Counter()

    def check(self, excused: Counter[Any] | None) -> None:
        """Fail as COMMIT would.

        :param excused: the violations of the other open transactions; None if none of them has
            written.
        :raises sqlalchemy.exc.DBAPIError: a constraint is violated.
        """
        del excused


class PostgresConstraints(DeferredConstraints):
    """The deferred constraints of PostgreSQL, which checks the whole outer transaction at once."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._errors: dict[str, exc.DBAPIError] = {}

    def find(self) -> Counter[Any]:
        """Return the current violations. Nothing is changed."""
        constraints = self._execute(_DEFERRABLE).all()
        found: Counter[Any] = Counter()
        if not constraints or self._holds("ALL"):
            return found
        for oid, name, _, kind in constraints:
            if not self._holds(name):
                rows = self._rows(_VIOLATIONS.get(kind), oid)
                # The error names the first violation only, which may be of another transaction.
                found.update((name, row) for row in rows or [str(self._errors[name].orig)])
        return found

    def check(self, excused: Counter[Any] | None) -> None:
        """Fail as COMMIT would."""
        if excused is not None:
            for name, _ in self.find() - excused:
                raise self._errors[name]
            return
        constraints = self._execute(_DEFERRABLE).all()
        if constraints:
            self._execute("SET CONSTRAINTS ALL IMMEDIATE")
        deferred = [name for _, name, initially, _ in constraints if initially]
        if deferred:
            # The next transaction must find the constraints as they were declared.
            self._execute(f"SET CONSTRAINTS {', '.join(deferred)} DEFERRED")

    def _holds(self, name: str) -> bool:
        """Return whether a constraint is satisfied. Its check stays pending."""
        try:
            with self._undoing():
                self._execute(f"SET CONSTRAINTS {name} IMMEDIATE")
        except exc.DBAPIError as error:
            self._errors[name] = error
            return False
        return True

    def _rows(self, query: str | None, oid: int) -> list[Any]:
        """Return the rows that violate a constraint, as far as the connection may read them."""
        if query is None:
            return []
        with contextlib.suppress(exc.DBAPIError), self._undoing():
            # The current role may lack privileges to read what another transaction has written.
            self._execute("SET LOCAL SESSION AUTHORIZATION DEFAULT")
            self._execute("SET LOCAL ROLE NONE")
            return [*self._execute(self._execute(query.format(oid=oid)).scalar_one()).scalars()]
        return []

    @contextlib.contextmanager
    def _undoing(self) -> Generator[None]:
        self._execute("SAVEPOINT wsgi_dbsession_check")
        try:
            yield
        finally:
            self._execute("ROLLBACK TO SAVEPOINT wsgi_dbsession_check")
            self._execute("RELEASE SAVEPOINT wsgi_dbsession_check")


class SQLiteConstraints(DeferredConstraints):
    """The deferred foreign keys of SQLite, which are checked when the outer transaction ends."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._before = self.find()

    def find(self) -> Counter[Any]:
        """Return the rows that violate a deferred foreign key."""
        found: Counter[Any] = Counter()
        if self._execute("PRAGMA foreign_keys").scalar():
            if self._execute("PRAGMA defer_foreign_keys").scalar():
                return Counter(map(tuple, self._execute("PRAGMA foreign_key_check")))
            for table in self._execute(_DEFERRED_TABLES).scalars().all():
                quoted = table.replace('"', '""')
                found.update(map(tuple, self._execute(f'PRAGMA foreign_key_check("{quoted}")')))
        return found

    def check(self, excused: Counter[Any] | None) -> None:
        """Fail as COMMIT would."""
        if self.find() - self._before - (excused or Counter()):
            failure = self._connection.dialect.loaded_dbapi.IntegrityError(
                "FOREIGN KEY constraint failed"
            )
            raise exc.IntegrityError("COMMIT", None, failure)


def deferred_constraints(connection: Connection) -> DeferredConstraints:
    """Return the deferred constraints of a connection's database."""
    if connection.dialect.name == "postgresql":
        return PostgresConstraints(connection)
    if connection.dialect.name == "sqlite":
        return SQLiteConstraints(connection)
    return DeferredConstraints(connection)
