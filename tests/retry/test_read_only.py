"""What only reads may run again, and who is around the middleware may choose more errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError

from tests.retry.applications import flask_app, list_app, protect
from tests.support.wsgi import drive, make_registry
from wsgi_dbsession._driver import READ_ONLY
from wsgi_dbsession.retry import Retry

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy.orm import Session, scoped_session

pytestmark = pytest.mark.promise("run again")


@pytest.mark.parametrize("read_only", [True, False])
def test_a_read_only_engine_does_not_stand_in_the_way(read_only: bool, tmp_path: Path) -> None:
    """At AUTOCOMMIT what was written would stay, unless the server refuses all writes.

    Not even a COMMIT is one there.
    """
    engine = create_engine(
        f"sqlite:///{tmp_path / 'test.db'}",
        isolation_level="AUTOCOMMIT",
        execution_options={READ_ONLY: read_only},
    )
    registry = make_registry(engine)
    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        registry.execute(text("SELECT 1"))
        registry.commit()
        registry.execute(text("SELECT 1"))
        if len(attempts) == 1:
            raise Retry

    app = protect(list_app(work), registry)

    if read_only:
        assert drive(app).body == b"done"
        assert len(attempts) == 2
    else:
        with pytest.raises(Retry):
            drive(app)
        assert len(attempts) == 1
    engine.dispose()


@pytest.mark.parametrize("shape", [list_app, flask_app], ids=["raised", "error page"])
def test_a_middleware_around_it_may_choose_more_errors(
    shape: Any, plain: scoped_session[Session]
) -> None:
    """Besides those of the application's own choice."""
    attempts: list[None] = []
    statements = ["SELECT nothing", "SELECT nowhere", "SELECT 1"]

    def work() -> None:
        attempts.append(None)
        plain.execute(text(statements[len(attempts) - 1]))

    def chosen(column: str) -> Any:
        return lambda error: isinstance(error, DBAPIError) and column in str(error.orig)

    app = protect(shape(work), plain, on=chosen("nothing"))
    app.retry_on(chosen("nowhere"))

    assert drive(app, "POST").body == b"done"
    assert len(attempts) == 3
