"""How often a request waits for the database, as the documentation has it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import bindparam, create_engine, text
from sqlalchemy.orm import scoped_session, sessionmaker

from tests.replica.conftest import DRIVERS
from tests.support.proxy import Proxy
from tests.support.wsgi import ask
from wsgi_dbsession import SessionMiddleware, current_scope
from wsgi_dbsession.replica import read_only_engine, session_class

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from sqlalchemy import URL, Engine

    from tests.support.clusters import PostgresCluster

    Keep = Callable[[Engine], Engine]

pytestmark = pytest.mark.xdist_group("replica")

PAGE = Path(__file__).parents[2] / "docs" / "replica.md"


def documented(row: str, driver: str) -> list[int]:
    """Return the numbers of the page's table for one SELECT and for five."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    (heads,) = (line for line in lines if "PyMySQL" in line)
    (cells,) = (line for line in lines if line[0] == row)
    return [int(number) for number in cells[heads.index(driver)].split("/")]


@pytest.mark.parametrize("driver", [*DRIVERS, pytest.param("PyMySQL", marks=pytest.mark.clusters)])
def test_the_round_trips_of_the_documentation_are_those_of_the_network(
    driver: str, request: pytest.FixtureRequest, keep: Keep
) -> None:
    """A request with one SELECT, and one with five, in a transaction and on a read-only engine."""
    if driver == "PyMySQL":
        url: URL = request.getfixturevalue("mariadb_url")
    else:
        cluster: PostgresCluster = request.getfixturevalue("cluster")
        url = cluster.primary.url(driver=driver)
    with Proxy.to(url) as proxy:
        engine = keep(create_engine(proxy.url(url)))
        reads = keep(read_only_engine(engine))
        registry = scoped_session(
            sessionmaker(class_=session_class(engine, reads)), scopefunc=current_scope
        )

        def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            for _ in range(int(environ["PATH_INFO"].strip("/"))):
                registry.scalar(text("SELECT :a").bindparams(bindparam("a", "one")))
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [b""]

        wrapped = SessionMiddleware(app, registry)

        def count(method: str, selects: int) -> int:
            proxy.reset()
            assert ask(wrapped, method, f"/{selects}").errors == []
            return proxy.round_trips()

        for method in ("GET", "POST"):
            # SQLAlchemy's questions to a new server; psycopg prepares what comes five times.
            count(method, 10)
        found = {
            method: [count(method, selects) for selects in (1, 5)] for method in ("GET", "POST")
        }

    assert found == {
        "GET": documented("on a read-only engine", driver),
        "POST": documented("in a transaction", driver),
    }
