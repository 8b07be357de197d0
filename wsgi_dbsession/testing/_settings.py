"""The settings that a transaction makes for itself: ``SET LOCAL``, and the one of SQLite.

They outlast the release of a savepoint, so each transaction gets its own whenever it goes on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import func, select

from ._statements import local_settings

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from sqlalchemy import Connection

    from ._savepoints import IsolatedTransaction, Savepoint

# The names in the functions of the database; not those in PostgreSQL's own.
_BODIES = """
    SELECT prosrc FROM pg_proc WHERE pronamespace <> 'pg_catalog'::regnamespace
        AND (prosrc ILIKE '%set_config%' OR prosrc ILIKE '%local%')
"""

# The other settings depend on them: a role must be allowed to make a setting.
_ROLES = ("session_authorization", "role")


class LocalSettings:
    """The local settings of a database that has none."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._outside = self._read(())  # what is in force outside of a transaction

    def learn(self, names: Iterable[str]) -> None:
        """Look after these settings from now on, too."""
        new = [name for name in names if name not in self._outside]
        if new:
            self._outside.update(self._read(new))

    def save(self, transaction: IsolatedTransaction) -> None:
        """Keep the settings in force for when the transaction goes on."""
        transaction.settings = self._read(self._outside)

    def restore(self, transaction: IsolatedTransaction) -> None:
        """Give a transaction its own settings in place of those of others."""
        outside, now = self._outside, self._read(self._outside)
        wanted = {**outside, **transaction.settings}
        changed = [name for name in wanted if wanted[name] != now[name]]
        if not changed:
            return
        roles = [name for name in _ROLES if name in outside]
        for name in roles:
            if now[name] != outside[name]:
                self._set(name, outside[name])
        for name in changed:
            if name not in roles:
                self._set(name, wanted[name])
        for name in roles:
            if wanted[name] != outside[name]:
                self._set(name, wanted[name])

    def remember(self, transaction: IsolatedTransaction, names: Collection[str]) -> None:
        """Remember settings of the connection that the transaction is about to change."""
        del transaction, names

    def revert(self, savepoint: Savepoint) -> None:
        """Take back those that its owner has changed since.

        The savepoint may have been released or moved in order to keep what others have committed.
        """
        del savepoint

    def _read(self, names: Collection[str]) -> dict[str, str]:
        return dict.fromkeys(names, "")

    def _set(self, name: str, value: str) -> None:
        """Set it until the transaction ends."""


class PostgresSettings(LocalSettings):
    """Those that statements and functions of the application set by ``SET LOCAL``."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        bodies = connection.exec_driver_sql(
            _BODIES, execution_options={"no_parameters": True}
        ).scalars()
        self.learn({name for body in bodies for name in local_settings(body)})

    def _read(self, names: Collection[str]) -> dict[str, str]:
        if not names:
            return {}
        row = self._connection.execute(
            select(*(func.pg_catalog.current_setting(name, True) for name in names))
        ).one()
        # One that was never set is NULL before, and empty after its transaction has ended.
        return {name: value or "" for name, value in zip(names, row, strict=True)}

    def _set(self, name: str, value: str, *, local: bool = True) -> None:
        self._connection.execute(select(func.pg_catalog.set_config(name, value, local)))

    def remember(self, transaction: IsolatedTransaction, names: Collection[str]) -> None:
        """Remember settings of the connection that the transaction is about to change."""
        transaction.replaced.extend(self._read(names).items())

    def revert(self, savepoint: Savepoint) -> None:
        """Take back those that its owner has changed since."""
        assert savepoint.owner is not None
        # They stay in the list: the rollback of the transaction may bring them into force again.
        for name, value in reversed(savepoint.owner.replaced[savepoint.replaced :]):
            if self._read([name])[name] != value:
                self._set(name, value, local=False)


class SQLiteSettings(LocalSettings):
    """The only one of SQLite: ``PRAGMA defer_foreign_keys``."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self.learn(["defer_foreign_keys"])

    def _read(self, names: Collection[str]) -> dict[str, str]:
        read = self._connection.exec_driver_sql
        return {name: str(read(f"PRAGMA {name}").scalar()) for name in names}

    def _set(self, name: str, value: str) -> None:
        self._connection.exec_driver_sql(f"PRAGMA {name} = {value}")


def local_settings_of(connection: Connection) -> LocalSettings:
    """Return the local settings of a connection's database."""
    if connection.dialect.name == "postgresql":
        return PostgresSettings(connection)
    if connection.dialect.name == "sqlite":
        return SQLiteSettings(connection)
    return LocalSettings(connection)
