"""A driver's connection that is closed tells nothing, and raises nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wsgi_dbsession._driver import autocommits
from wsgi_dbsession.retry._drivers import is_standby, refuses_writes

if TYPE_CHECKING:
    from sqlalchemy import Engine


class Closed:
    """As mysqlclient's, or psycopg2's."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("the connection is closed")


def test_a_closed_connection_may_write_and_does_not_commit_by_itself() -> None:
    """What is not known must not excuse another attempt."""
    closed = Closed()
    assert not autocommits(closed)
    assert not refuses_writes(closed)


def test_each_driver_can_be_asked_when_it_is_closed(engine: Engine) -> None:
    """After the loss of the connection, too."""
    with engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        assert not autocommits(driver)
        assert not is_standby(driver)
        connection.invalidate()
    assert not autocommits(driver)
    assert not is_standby(driver)
