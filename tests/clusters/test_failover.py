"""A PostgreSQL primary is lost, and a standby promoted: what clients see, which writes survive.

The engine is that of ``docs/failover.md``.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

from tests.clusters.bank import ACKNOWLEDGED, ROLLED_BACK, UNKNOWN, Bank, Load, audit
from tests.support.clusters import PostgresCluster, postgres_cluster
from tests.support.processes import wait_until
from tests.support.wsgi import Server, drive
from wsgi_dbsession import Scope, SessionMiddleware, current_scope

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from sqlalchemy import URL
    from sqlalchemy.orm import Session, scoped_session

    from tests.clusters.conftest import MakeRegistry
    from tests.support.clusters import PostgresServer

pytestmark = pytest.mark.clusters

ROOT = Path(__file__).parents[2]
CLIENTS = 6


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    """What the code of ``docs/failover.md`` defines."""
    document = Sybil([PythonCodeBlockParser()], path=str(ROOT)).parse(ROOT / "docs/failover.md")
    for example in document.examples():
        example.evaluate()
    return document.namespace


@pytest.fixture
def cluster() -> Iterator[PostgresCluster]:
    """A primary with one standby, of the test's own."""
    with postgres_cluster(1) as made:
        yield made


def url_of(recipe: dict[str, Any], *servers: PostgresServer) -> URL:
    """Return the URL of the documentation, with these servers for its hosts."""
    url: URL = recipe["engine"].url
    hosts = tuple(f"{server.host}:{server.port}" for server in servers)
    return url.set(username="postgres", database="postgres", query={**url.query, "host": hosts})


def make_notes(server: PostgresServer) -> None:
    server.fetch("CREATE TABLE note (text text NOT NULL)")


def notes(server: PostgresServer) -> list[str]:
    return [text for (text,) in server.fetch("SELECT text FROM note ORDER BY text")]


class Writer:
    """An application that writes one note; the query string is its text."""

    def __init__(self, registry: scoped_session[Session]) -> None:
        self.registry = registry
        self.scopes: dict[str, Scope] = {}
        self.app: WSGIApplication = SessionMiddleware(self._respond, registry)

    def _respond(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        written = environ["QUERY_STRING"]
        self.scopes[written] = current_scope()
        self.registry.execute(text("INSERT INTO note VALUES (:text)"), {"text": written})
        start_response("201 Created", [("Content-Type", "text/plain")])
        return [b"written"]

    def write(self, note: str) -> str:
        """Return the status that a client gets."""
        server: Server = drive(self.app, "POST", QUERY_STRING=note)
        return server.status


class Waiting(threading.Thread):
    """A request whose COMMIT waits for a synchronous standby."""

    def __init__(self, writer: Writer, note: str, primary: PostgresServer) -> None:
        super().__init__()
        self._writer = writer
        self._note = note
        self.answer: str | DBAPIError | None = None
        self.start()
        query = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        wait_until(lambda: primary.fetch(query), "COMMIT waits for the standby")
        self.pid: int = primary.value(query)

    def run(self) -> None:
        try:
            self.answer = self._writer.write(self._note)
        except DBAPIError as error:
            self.answer = error

    def result(self) -> str | DBAPIError | None:
        self.join(60)
        return self.answer


def cut_off(cluster: PostgresCluster, standby: PostgresServer) -> None:
    """Let a standby receive nothing more."""
    standby.configure(primary_conninfo="")
    wait_until(
        lambda: (
            not cluster.primary.fetch(
                "SELECT 1 FROM pg_stat_replication WHERE application_name = %s", standby.name
            )
        ),
        "the standby is cut off",
    )


# -- under load -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("driver", "synchronous", "how"),
    [
        ("psycopg", True, "killed"),
        ("psycopg2", True, "killed"),
        ("psycopg", False, "stopped"),
        ("psycopg2", False, "stopped"),
    ],
)
def test_no_failover_loses_or_repeats_a_transfer(
    driver: str,
    synchronous: bool,
    how: str,
    cluster: PostgresCluster,
    recipe: dict[str, Any],
    make_session: MakeRegistry,
) -> None:
    """What was acknowledged is in the new primary's books, once; what failed is not.

    The clients see no other errors than those of which the outcome is unknown.
    """
    primary, (standby,) = cluster.primary, cluster.standbys
    url = url_of(recipe, primary, standby).set(drivername=f"postgresql+{driver}")
    bank = Bank(make_session(url, pool_size=CLIENTS), attempts=100)
    bank.open(primary.fetch)
    if synchronous:
        cluster.synchronous(standby)

    with Load([bank], CLIENTS) as load:
        load.run_until(50)
        if how == "killed":
            primary.kill()
        else:
            primary.stop("fast")
        standby.promote()
        load.run_until(50)

    audit(bank, load, standby.fetch)
    assert load.count(ACKNOWLEDGED) >= 100
    assert load.count(ROLLED_BACK) == 0, load.errors


# -- which writes survive -------------------------------------------------------------------------


def test_an_asynchronous_standby_may_lack_acknowledged_writes(
    cluster: PostgresCluster, recipe: dict[str, Any], make_session: MakeRegistry
) -> None:
    """The client has its 201, and the new primary does not have the row."""
    primary, (standby,) = cluster.primary, cluster.standbys
    make_notes(primary)
    cluster.wait_caught_up()
    writer = Writer(make_session(url_of(recipe, primary, standby)))
    cut_off(cluster, standby)

    assert writer.write("acknowledged") == "201 Created"

    primary.kill()
    standby.promote()
    assert notes(standby) == []


def test_a_write_that_no_standby_has_is_not_acknowledged(
    cluster: PostgresCluster, recipe: dict[str, Any], make_session: MakeRegistry
) -> None:
    """COMMIT waits; when the primary is lost, the outcome is unknown, and the row is lost."""
    primary, (standby,) = cluster.primary, cluster.standbys
    make_notes(primary)
    cluster.synchronous(standby)
    writer = Writer(make_session(url_of(recipe, primary, standby)))
    assert writer.write("before") == "201 Created"
    cut_off(cluster, standby)

    waiting = Waiting(writer, "during", primary)
    primary.kill()

    assert isinstance(waiting.result(), DBAPIError)
    assert writer.scopes["during"].reason == UNKNOWN
    standby.promote()
    assert notes(standby) == ["before"]


def test_a_terminated_wait_is_an_unknown_outcome(
    cluster: PostgresCluster, recipe: dict[str, Any], make_session: MakeRegistry
) -> None:
    """The client gets an error, although the primary has the row."""
    primary, (standby,) = cluster.primary, cluster.standbys
    make_notes(primary)
    cluster.synchronous(standby)
    writer = Writer(make_session(url_of(recipe, primary, standby)))
    cut_off(cluster, standby)

    waiting = Waiting(writer, "terminated", primary)
    primary.fetch("SELECT pg_terminate_backend(%s)", waiting.pid)

    assert isinstance(waiting.result(), DBAPIError)
    assert writer.scopes["terminated"].reason == UNKNOWN
    assert notes(primary) == ["terminated"]


def test_a_cancelled_wait_is_acknowledged(
    cluster: PostgresCluster, recipe: dict[str, Any], make_session: MakeRegistry
) -> None:
    """PostgreSQL reports a success then: of what ``docs/failover.md`` warns."""
    primary, (standby,) = cluster.primary, cluster.standbys
    make_notes(primary)
    cluster.synchronous(standby)
    cluster.wait_caught_up()
    writer = Writer(make_session(url_of(recipe, primary, standby)))
    cut_off(cluster, standby)

    waiting = Waiting(writer, "cancelled", primary)
    primary.fetch("SELECT pg_cancel_backend(%s)", waiting.pid)

    assert waiting.result() == "201 Created"
    assert notes(primary) == ["cancelled"]
    assert notes(standby) == []


def test_a_statement_timeout_does_not_end_the_wait(
    cluster: PostgresCluster, recipe: dict[str, Any], make_session: MakeRegistry
) -> None:
    """It is over long before the standby comes back, and the client gets its 201 then."""
    primary, (standby,) = cluster.primary, cluster.standbys
    make_notes(primary)
    cluster.synchronous(standby)
    url = url_of(recipe, primary, standby)
    options = {"options": "-c statement_timeout=100"}
    writer = Writer(make_session(url, connect_args=options))
    conninfo = standby.value("SHOW primary_conninfo")
    cut_off(cluster, standby)

    waiting = Waiting(writer, "patient", primary)
    waiting.join(1)
    assert waiting.is_alive()
    standby.configure(primary_conninfo=conninfo)

    assert waiting.result() == "201 Created"
    cluster.wait_caught_up()
    assert notes(standby) == ["patient"]


def test_the_standby_that_received_most_has_each_acknowledged_write(
    recipe: dict[str, Any], make_session: MakeRegistry
) -> None:
    """With ``ANY 1`` the other one may lack it."""
    with postgres_cluster(2) as cluster:
        primary, standbys = cluster.primary, cluster.standbys
        make_notes(primary)
        cluster.synchronous(*standbys)
        cluster.wait_caught_up()
        writer = Writer(make_session(url_of(recipe, primary, *standbys)))
        cut_off(cluster, standbys[0])
        assert writer.write("acknowledged") == "201 Created"
        primary.kill()

        behind, best = sorted(standbys, key=received)
        best.promote()

        assert notes(best) == ["acknowledged"]
        assert notes(behind) == []
        # libpq passes over the lost primary and the standby.
        later = Writer(make_session(url_of(recipe, primary, behind, best)))
        assert later.write("later") == "201 Created"
        assert notes(best) == ["acknowledged", "later"]


def received(standby: PostgresServer) -> int:
    """Return how much WAL a standby has received, in bytes."""
    found: int = standby.value("SELECT (pg_last_wal_receive_lsn() - '0/0')::bigint")
    return found


@pytest.mark.parametrize("synchronous", [True, False])
def test_a_former_primary_that_starts_again_is_a_second_one(
    synchronous: bool,
    cluster: PostgresCluster,
    recipe: dict[str, Any],
    make_session: MakeRegistry,
) -> None:
    """A client that finds it first writes there; without a synchronous standby, with success."""
    primary, (standby,) = cluster.primary, cluster.standbys
    make_notes(primary)
    cluster.wait_caught_up()
    if synchronous:
        cluster.synchronous(standby)
    primary.kill()
    standby.promote()
    primary.start()
    writer = Writer(make_session(url_of(recipe, primary, standby)))

    if synchronous:
        waiting = Waiting(writer, "astray", primary)
        primary.stop("immediate")
        assert isinstance(waiting.result(), DBAPIError)
        assert writer.scopes["astray"].reason == UNKNOWN
    else:
        assert writer.write("astray") == "201 Created"

    assert notes(standby) == []
