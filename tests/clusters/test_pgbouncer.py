"""Behind PgBouncer in transaction mode: the outcomes, the truth about a failed commit, retry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from tests.clusters.bank import UNKNOWN
from tests.clusters.conftest import create_tables
from tests.support.clusters import PgBouncer, PostgresServer, pgbouncer, postgres_cluster
from tests.support.models import Author, Book, Note
from tests.support.processes import wait_until
from tests.support.proxy import Proxy
from tests.support.wsgi import Server, drive, make_environ
from wsgi_dbsession import Scope, SessionMiddleware, current_scope, session_scope
from wsgi_dbsession.retry import RetryMiddleware, run_transaction

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from sqlalchemy import URL
    from sqlalchemy.orm import Session, scoped_session

    from tests.clusters.conftest import MakeRegistry

pytestmark = pytest.mark.clusters

# PgBouncer before 1.21 knows no prepared statements.
OPTIONS: dict[str, dict[str, Any]] = {
    "psycopg": {"connect_args": {"prepare_threshold": None}},
    "psycopg2": {},
    "pg8000": {},
}


@dataclass
class Place:
    """The server, a network in front of it, and the bouncer in front of that."""

    server: PostgresServer
    network: Proxy
    bouncer: PgBouncer

    def notes(self) -> list[str]:
        """Return the texts of the committed notes, as the server has them."""
        return [text for (text,) in self.server.fetch("SELECT text FROM note ORDER BY text")]

    def states(self) -> set[str]:
        """Return the states of the backends that the bouncer has."""
        rows = self.server.fetch(
            "SELECT state FROM pg_stat_activity WHERE backend_type = 'client backend'"
            " AND pid <> pg_backend_pid()"
        )
        return {state for (state,) in rows}


@pytest.fixture(scope="module")
def whole_place() -> Iterator[Place]:
    with (
        postgres_cluster(0) as cluster,
        Proxy.to(cluster.primary.url()) as network,
        pgbouncer(network.url(cluster.primary.url())) as bouncer,
    ):
        create_tables(cluster.primary.url())
        yield Place(cluster.primary, network, bouncer)


@pytest.fixture
def place(whole_place: Place) -> Iterator[Place]:
    """The place with empty tables; at the test's end no transaction may be open."""
    whole_place.server.fetch("TRUNCATE note, author, book RESTART IDENTITY")
    yield whole_place
    wait_until(lambda: whole_place.states() <= {"idle"}, "all transactions end", timeout=10)


@pytest.fixture(params=OPTIONS)
def driver(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def url(place: Place, driver: str) -> URL:
    return place.bouncer.url(driver=driver)


@pytest.fixture
def registry(url: URL, driver: str, make_session: MakeRegistry) -> scoped_session[Session]:
    """A session registry that connects to the bouncer, for each driver in turn."""
    return make_session(url, **OPTIONS[driver])


def application(
    work: Callable[[], object], status: str = "200 OK", *, blocks: int = 1
) -> WSGIApplication:
    """Make an application that works before its first block."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        work()
        start_response(status, [("Content-Type", "text/plain")])
        return [b"done"] if blocks == 1 else (b"part" for _ in range(blocks))

    return app


class MistakeError(Exception):
    pass


class InterruptionError(BaseException):
    """As gevent's, or a signal's."""


def make_mistake(*_: object) -> bool:
    raise MistakeError


# -- the outcome ----------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["200 OK", "204 No Content", "302 Found"])
def test_a_successful_response_commits(
    status: str, place: Place, registry: scoped_session[Session]
) -> None:
    """The last row of the table."""
    app = application(lambda: registry.add(Note(text="note")), status)

    assert drive(SessionMiddleware(app, registry), "POST").status == status

    assert place.notes() == ["note"]


def test_an_error_rolls_back(place: Place, registry: scoped_session[Session]) -> None:
    """Also what was flushed to the server."""

    def work() -> None:
        registry.add(Note(text="note"))
        registry.flush()
        raise MistakeError

    with pytest.raises(MistakeError):
        drive(SessionMiddleware(application(work), registry), "POST")

    assert place.notes() == []


def test_an_interruption_rolls_back_and_gives_the_backend_back(
    place: Place, registry: scoped_session[Session]
) -> None:
    """Its connection to the bouncer is closed, and the bouncer ends the transaction."""
    attempts: list[None] = []

    def work() -> None:
        registry.add(Note(text="note"))
        registry.flush()
        attempts.append(None)
        if len(attempts) == 1:
            raise InterruptionError

    app = SessionMiddleware(application(work), registry)
    with pytest.raises(InterruptionError):
        drive(app, "POST")
    wait_until(lambda: place.states() <= {"idle"}, "the transaction ends", timeout=10)
    assert place.notes() == []

    assert drive(app, "POST").status == "200 OK"
    assert place.notes() == ["note"]


def test_discarded_work_is_not_called_a_success(
    place: Place, registry: scoped_session[Session]
) -> None:
    """Whether it was written is asked in the transaction itself, through the bouncer."""

    def work() -> None:
        registry.execute(text("INSERT INTO note (text) VALUES ('note')"))
        registry.remove()

    with pytest.raises(RuntimeError, match="a Session was closed at"):
        drive(SessionMiddleware(application(work), registry), "POST")

    assert place.notes() == []


@pytest.mark.parametrize(("moment", "expected"), [("headers", ["note"]), ("close", [])])
def test_the_moment_is_the_applications_choice(
    moment: Literal["headers", "close"],
    expected: list[str],
    place: Place,
    registry: scoped_session[Session],
) -> None:
    """A stream that is left after its first block was committed before it, or not at all."""
    app = application(lambda: registry.add(Note(text="note")), blocks=3)
    wrapped = SessionMiddleware(app, registry, commit_on=moment)

    Server().run(wrapped, make_environ("POST"), blocks=1)

    assert place.notes() == expected


def test_a_doomed_scope_rolls_back(place: Place, registry: scoped_session[Session]) -> None:
    """Whatever the status says."""

    def work() -> None:
        registry.add(Note(text="note"))
        registry.flush()
        current_scope().doom()

    assert drive(SessionMiddleware(application(work), registry), "POST").status == "200 OK"

    assert place.notes() == []


def test_an_incomplete_body_rolls_back(place: Place, registry: scoped_session[Session]) -> None:
    """The client goes away after the first of three blocks."""

    def work() -> None:
        registry.add(Note(text="note"))
        registry.flush()

    app = SessionMiddleware(application(work, blocks=3), registry)
    Server().run(app, make_environ("POST"), blocks=1)

    assert place.notes() == []


@pytest.mark.parametrize(("keep", "expected"), [(False, []), (True, ["note"])])
@pytest.mark.parametrize("status", ["404 Not Found", "500 Internal Server Error"])
def test_an_error_page_rolls_back_unless_kept(
    status: str, keep: bool, expected: list[str], place: Place, registry: scoped_session[Session]
) -> None:
    """The veto, and what overrules it."""

    def work() -> None:
        registry.add(Note(text="note"))
        registry.flush()
        if keep:
            current_scope().keep()

    assert drive(SessionMiddleware(application(work, status), registry), "POST").status == status

    assert place.notes() == expected


def test_a_veto_that_fails_rolls_back(place: Place, registry: scoped_session[Session]) -> None:
    """It counts as one that returned true, and its error reaches the server."""
    app = application(lambda: registry.add(Note(text="note")))

    with pytest.raises(MistakeError):
        drive(SessionMiddleware(app, registry, commit_veto=make_mistake), "POST")

    assert place.notes() == []


@pytest.mark.parametrize(("fails", "expected"), [(False, ["note"]), (True, [])])
def test_a_block_commits_or_rolls_back(
    fails: bool, expected: list[str], place: Place, registry: scoped_session[Session]
) -> None:
    """``session_scope`` outside of a request."""
    try:
        with session_scope(registry):
            registry.add(Note(text="note"))
            registry.flush()
            if fails:
                raise MistakeError
    except MistakeError:
        assert fails

    assert place.notes() == expected


def test_an_aborted_transaction_is_not_called_a_success(
    place: Place, registry: scoped_session[Session]
) -> None:
    """PgBouncer passes on ROLLBACK as the answer to COMMIT, which the drivers do not report."""

    def work() -> None:
        registry.execute(text("INSERT INTO note (text) VALUES ('note')"))
        with pytest.raises(DBAPIError):
            registry.execute(text("SELECT nonsense"))

    with pytest.raises(Exception, match=r"\S"):
        drive(SessionMiddleware(application(work), registry), "POST")

    assert place.notes() == []


def test_a_commit_that_the_server_refuses_reaches_the_client(
    place: Place, registry: scoped_session[Session]
) -> None:
    """A deferred constraint fails in the COMMIT, and it is known that nothing was committed."""
    scopes: list[Scope] = []

    def work() -> None:
        scopes.append(current_scope())
        registry.add_all([Note(text="note"), Book(author_id=1)])

    with pytest.raises(DBAPIError):
        drive(SessionMiddleware(application(work), registry), "POST")

    assert (scopes[0].outcome, place.notes()) == ("rollback", [])


def test_two_phases_commit_whichever_backends_they_get(
    place: Place, url: URL, driver: str, make_session: MakeRegistry
) -> None:
    """A prepared transaction belongs to no connection."""
    registries = [make_session(url, twophase=True, **OPTIONS[driver]) for _ in range(2)]

    with session_scope(*registries):
        for registry in registries:
            registry.add(Note(text="note"))

    assert place.notes() == ["note", "note"]
    assert place.server.fetch("SELECT gid FROM pg_prepared_xacts") == []


def test_one_backend_serves_many_requests(
    place: Place, url: URL, driver: str, make_session: MakeRegistry
) -> None:
    """Between its requests an application holds no backend, though its pool is full."""
    registries = [make_session(url, **OPTIONS[driver]) for _ in range(8)]

    for registry in registries:
        app = application(lambda: registry.add(Note(text="note")))  # noqa: B023
        drive(SessionMiddleware(app, registry), "POST")

    assert len(place.notes()) == 8
    (pool,) = [row for row in place.bouncer.admin("SHOW POOLS") if row[0] == "postgres"]
    assert pool[2] == "8", "clients that have a connection to the bouncer"
    backends = place.server.value(
        "SELECT count(*) FROM pg_stat_activity WHERE client_addr IS NOT NULL"
        " AND pid <> pg_backend_pid()"
    )
    assert backends <= int(place.bouncer.settings["default_pool_size"])


# -- the truth about a failed commit --------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        pytest.param("eat_commit_answer", ["note"], id="after it took place"),
        pytest.param("eat_commit", [], id="before it took place"),
    ],
)
def test_a_backend_that_is_lost_at_commit_leaves_the_outcome_unknown(
    how: str, expected: list[str], place: Place, registry: scoped_session[Session]
) -> None:
    """The bouncer says the same in both cases, and the request is not run again."""
    scopes: list[Scope] = []

    def work() -> None:
        scopes.append(current_scope())
        registry.add(Note(text="note"))

    app = RetryMiddleware(SessionMiddleware(application(work), registry), attempts=5, backoff=0)
    drive(app, "POST")
    place.server.fetch("TRUNCATE note")
    lost = getattr(place.network, how)()

    with pytest.raises(DBAPIError):
        drive(app, "POST")

    assert lost.wait(10)
    assert len(scopes) == 2
    assert scopes[1].reason == UNKNOWN
    assert place.notes() == expected


def test_a_backend_that_ends_in_a_commit_leaves_the_outcome_unknown(
    place: Place, registry: scoped_session[Session]
) -> None:
    """With psycopg there are two answers, the server's and the bouncer's: an InternalError."""
    place.server.fetch(
        "CREATE OR REPLACE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END $$"
    )
    place.server.fetch(
        "CREATE CONSTRAINT TRIGGER die AFTER INSERT ON author DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION die()"
    )
    scopes: list[Scope] = []

    def work() -> None:
        scopes.append(current_scope())
        registry.add_all([Note(text="note"), Author(name="dies")])

    app = RetryMiddleware(SessionMiddleware(application(work), registry), attempts=5, backoff=0)
    try:
        with pytest.raises(DBAPIError):
            drive(app, "POST")
    finally:
        place.server.fetch("DROP TRIGGER die ON author")

    assert len(scopes) == 1
    assert scopes[0].reason == UNKNOWN
    assert place.notes() == []


# -- retry ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["backends", "bouncer", "network"])
def test_connections_that_broke_between_requests_are_not_noticed(
    end: str, place: Place, registry: scoped_session[Session]
) -> None:
    """The pool is full of connections to a bouncer, or a server, that was restarted."""
    app = RetryMiddleware(
        SessionMiddleware(application(lambda: registry.add(Note(text="note"))), registry),
        backoff=0,
    )
    drive(app, "POST")
    if end == "backends":
        place.server.fetch(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
            " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )
    elif end == "bouncer":
        place.bouncer.restart()
    else:
        place.network.cut()

    assert drive(app, "POST").status == "200 OK"

    assert place.notes() == ["note", "note"]


def test_a_backend_that_ends_in_mid_transaction_is_not_noticed(
    place: Place, registry: scoped_session[Session]
) -> None:
    """Nothing was committed, so the request runs again, on another backend."""
    attempts: list[int] = []

    def work() -> None:
        registry.add(Note(text="note"))
        registry.flush()
        attempts.append(registry.scalars(text("SELECT pg_backend_pid()")).one())
        if len(attempts) == 1:
            place.server.fetch("SELECT pg_terminate_backend(%s, 10000)", attempts[0])
        registry.execute(text("SELECT 1"))

    app = RetryMiddleware(SessionMiddleware(application(work), registry), backoff=0)

    assert drive(app, "POST").status == "200 OK"

    assert len(attempts) == len(set(attempts)) == 2
    assert place.notes() == ["note"]


def test_a_lost_race_is_retried(
    place: Place, url: URL, driver: str, make_session: MakeRegistry
) -> None:
    """A serialization failure behind the bouncer is one."""
    registry = make_session(url, **OPTIONS[driver])
    attempts: list[None] = []
    place.server.fetch("INSERT INTO note (text) VALUES ('note')")

    def job() -> None:
        attempts.append(None)
        registry.execute(text("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE"))
        registry.execute(text("SELECT * FROM note"))
        if len(attempts) == 1:
            place.server.fetch("UPDATE note SET text = text || '!'")
        registry.execute(text("UPDATE note SET text = text || '?'"))

    run_transaction(job, registry, backoff=0)

    assert (len(attempts), place.notes()) == (2, ["note!?"])
