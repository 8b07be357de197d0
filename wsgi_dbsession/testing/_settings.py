"""The settings of single transactions: ``SET LOCAL``, and a PRAGMA of SQLite.

They outlast the release of a savepoint, so they are restored whenever a transaction resumes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import func, select

from ._statements import local_settings

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from sqlalchemy import Connection

    from ._savepoints import IsolatedTransaction, Savepoint

# The functions that may change settings, without those of PostgreSQL itself.
_BODIES = """
    SELECT prosrc FROM pg_proc WHERE pronamespace <> 'pg_catalog'::regnamespace
        AND (prosrc ILIKE '%set_config%' OR prosrc ILIKE '%local%')
"""

# Whether another setting may be changed depends on these.
_ROLES = ("session_authorization", "role")


class LocalSettings:
    """The local settings of a database, by default none."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._outside = self._read(())  # the values outside of transactions

    def track(self, names: Iterable[str]) -> None:
        """Save and restore these settings, too, from now on."""
        new = [name for name in names if name not in self._outside]
        if new:
            self._outside.update(self._read(new))

    def save(self, transaction: IsolatedTransaction) -> None:
        """Save the current settings until the transaction resumes."""
        transaction.settings = self._read(self._outside)

    def restore(self, transaction: IsolatedTransaction) -> None:
        """Replace the current settings with those of a transaction."""
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

    def record(self, transaction: IsolatedTransaction, names: Collection[str]) -> None:
        """Record settings of the connection that a transaction is going to change."""
        del transaction, names

    def revert(self, savepoint: Savepoint) -> None:
        """Restore what the owner of a savepoint has recorded since.

        The savepoint may have been released or moved to keep what others have committed. Then its
        rollback does not restore them.
        """
        del savepoint

    def _read(self, names: Collection[str]) -> dict[str, str]:
        return dict.fromkeys(names, "")

    def _set(self, name: str, value: str) -> None:
        """Change a setting until the transaction ends."""


class PostgresSettings(LocalSettings):
    """The settings that statements and functions of the application set with ``SET LOCAL``."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        bodies = connection.exec_driver_sql(
            _BODIES, execution_options={"no_parameters": True}
        ).scalars()
        self.track({name for body in bodies for name in local_settings(body)})

    def _read(self, names: Collection[str]) -> dict[str, str]:
        if not names:
            return {}
        row = self._connection.execute(
            select(*(func.pg_catalog.current_setting(name, True) for name in names))
        ).one()
        # A custom setting is NULL at first, and empty after the transaction that has set it.
        return {name: value or "" for name, value in zip(names, row, strict=True)}

    def _set(self, name: str, value: str, *, local: bool = True) -> None:
        self._connection.execute(select(func.pg_catalog.set_config(name, value, local)))

    def record(self, transaction: IsolatedTransaction, names: Collection[str]) -> None:
        """Record settings of the connection that a transaction is going to change."""
        transaction.replaced.extend(self._read(names).items())

    def revert(self, savepoint: Savepoint) -> None:
        """Restore what the owner of a savepoint has recorded since."""
        assert savepoint.owner is not None
        # They stay in the list, because the rollback of the transaction may undo this.
        for name, value in reversed(savepoint.owner.replaced[savepoint.replaced :]):
            if self._read([name])[name] != value:
                self._set(name, value, local=False)


class SQLiteSettings(LocalSettings):
    """The only local setting of SQLite: ``PRAGMA defer_foreign_keys``."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self.track(["defer_foreign_keys"])

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
