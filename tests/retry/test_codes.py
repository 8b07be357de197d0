"""What drivers say of lost races."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from tests.retry.databases import race_of
from wsgi_dbsession.retry import RETRYABLE_CODES, Retry, is_retryable

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from tests.support.models import Database


def test_a_deadlock_of_postgresql_is_retryable(
    engine: Engine, postgres_database: Database
) -> None:
    """Each driver shows 40P01 in its own way."""
    with postgres_database.observer.begin() as connection:
        connection.execute(text("INSERT INTO note (text) VALUES ('one'), ('two')"))
    one, two = (f"UPDATE note SET text = 'new' WHERE id = {number}" for number in (1, 2))

    (error,) = race_of(engine, one, two, two, one)

    assert is_retryable(error)
    assert isinstance(error, DBAPIError)
    assert is_retryable(error.orig or error)


def test_a_serialization_failure_of_postgresql_is_retryable(
    engine: Engine, postgres_database: Database
) -> None:
    """The same for 40001."""
    with postgres_database.observer.begin() as connection:
        connection.execute(text("INSERT INTO note (text) VALUES ('one')"))
    repeatable = engine.execution_options(isolation_level="REPEATABLE READ")
    read, write = "SELECT * FROM note", "UPDATE note SET text = text || '!'"

    (error,) = race_of(repeatable, read, write, read, write)

    assert is_retryable(error)


def test_another_error_of_postgresql_is_not_retryable(engine: Engine) -> None:
    """Neither a violated constraint nor a mistake is a lost race."""
    for statement in ("INSERT INTO note (id) VALUES (1), (1)", "SELECT nonsense"):
        with engine.connect() as connection, pytest.raises(DBAPIError) as caught:
            connection.execute(text(statement))
        assert not is_retryable(caught.value)


def like(*bases: type, **attributes: Any) -> Any:
    """Make an error as a driver that is not here documents it."""
    error = type("OperationalError", bases, {})(*attributes.pop("args", ()))
    for name, value in attributes.items():
        setattr(error, name, value)
    return error


class DatabaseError(Exception):
    """PEP 249's, as each driver has one."""


class Details:
    """What oracledb and cx_Oracle have as an error's only argument."""

    def __init__(self, code: int) -> None:
        self.code = code


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        pytest.param(Retry(), True, id="Retry"),
        pytest.param(like(Exception, sqlstate="40001"), True, id="asyncpg"),
        pytest.param(
            like(DatabaseError, sqlstate="HY000", args=(1205, "Lock wait timeout", "HY000")),
            True,
            id="mysql-connector, lock wait timeout",
        ),
        pytest.param(like(DatabaseError, args=(1213, "Deadlock found")), True, id="mysqlclient"),
        pytest.param(like(DatabaseError, args=(1062, "Duplicate")), False, id="duplicate"),
        pytest.param(
            like(DatabaseError, args=("40001", "[40001] chosen as the deadlock victim")),
            True,
            id="pyodbc",
        ),
        pytest.param(
            like(DatabaseError, args=("23000", "[23000] ...")), False, id="pyodbc, other"
        ),
        pytest.param(like(DatabaseError, args=(Details(8177),)), True, id="oracledb, ORA-08177"),
        pytest.param(like(DatabaseError, args=(Details(60),)), True, id="oracledb, ORA-00060"),
        pytest.param(like(DatabaseError, args=(Details(1),)), False, id="oracledb, ORA-00001"),
        pytest.param(like(DatabaseError, args=(None,)), False, id="no code"),
        pytest.param(like(DatabaseError), False, id="no argument"),
        pytest.param(like(OSError, args=(1205, "an error of the system")), False, id="OSError"),
        pytest.param(ValueError("40001"), False, id="no error of a database"),
    ],
)
def test_the_codes_of_other_drivers_are_found(error: Exception, expected: bool) -> None:
    """They stand where the driver's documentation says, raw or wrapped by SQLAlchemy."""
    assert is_retryable(error) is expected
    if not isinstance(error, Retry):
        assert is_retryable(DBAPIError("SELECT 1", {}, error)) is expected


def test_the_table_of_the_documentation_is_the_table() -> None:
    """``docs/retry.md`` lists each code, in the order of the code."""
    path = Path(__file__).parents[2] / "docs" / "retry.md"
    rows = [line.split("|") for line in path.read_text().splitlines() if line.startswith("| `")]
    listed = {row[1].strip().strip("`"): row[2].strip() for row in rows}
    assert listed == dict(RETRYABLE_CODES)
