"""Whether a driver's connection can write, without a round trip."""

from __future__ import annotations

from typing import Any


def refuses_writes(driver: Any) -> bool:
    """Return whether PostgreSQL refuses every write at AUTOCOMMIT on this connection.

    The server reports it on its own, from version 14 on. The execution option
    ``postgresql_readonly`` is not enough, because psycopg ignores it at AUTOCOMMIT.
    """
    return is_standby(driver) or _parameter(driver, "default_transaction_read_only") == "on"


def is_standby(driver: Any) -> bool:
    """Return whether the server of this connection is a standby of PostgreSQL."""
    return _parameter(driver, "in_hot_standby") == "on"


def _parameter(driver: Any, name: str) -> str | None:
    found: str | None
    try:
        status = getattr(getattr(driver, "info", None), "parameter_status", None)
        if status is not None:  # psycopg, psycopg2
            found = status(name)
        else:  # pg8000
            found = getattr(driver, "parameter_statuses", {}).get(name)
    except Exception:  # it is closed
        return None
    return found
