"""Requests with the same key at the same time: one takes effect, the others get its response."""

from __future__ import annotations

import contextlib
import io
import threading
from typing import TYPE_CHECKING, Any
from wsgiref.util import FileWrapper

import pytest
from sqlalchemy import event, select, text
from sqlalchemy.dialects import mysql
from sqlalchemy.exc import OperationalError

from tests.idempotency.shop import (
    KEY,
    KEYS,
    PATIENCE,
    Note,
    Shop,
    count_notes,
    order,
    protect,
    race,
    user_of,
)
from tests.support.errors import AppError, raise_error
from tests.support.processes import wait_until
from wsgi_dbsession import SessionMiddleware
from wsgi_dbsession.idempotency import Idempotency
from wsgi_dbsession.idempotency._rows import _NoWaitInsert
from wsgi_dbsession.retry import RetryMiddleware

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from sqlalchemy.orm import Session, scoped_session

    from tests.idempotency.shop import Place, Reply

THREADS = 20
LEVELS = ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]


def registry_at(place: Place, level: str) -> scoped_session[Session]:
    """Make a registry at this isolation level; SQLite has only one."""
    return place.registry(**({} if place.name == "sqlite" else {"isolation_level": level}))


@pytest.mark.parametrize("level", LEVELS)
def test_twenty_requests_take_effect_once(every_place: Place, level: str) -> None:
    """Nineteen of them get the stored response of the one that ran, at each isolation level."""
    registry = registry_at(every_place, level)
    shop = Shop(registry)
    app = protect(shop, registry)
    replies: list[Reply] = []

    race(THREADS, lambda number: replies.append(order(app)))

    assert {(reply.status, reply.body) for reply in replies} == {("201 Created", replies[0].body)}
    assert sorted(reply.is_replayed for reply in replies) == [False] + [True] * (THREADS - 1)
    assert shop.calls == 1
    assert every_place.notes() == ["tea"]
    assert every_place.keys() == ["201 Created"]


@pytest.mark.parametrize("level", LEVELS)
def test_after_a_failure_another_one_of_them_runs(place: Place, level: str) -> None:
    """The rollback lets one of those that wait go on; MariaDB calls it a deadlock for the rest."""
    registry = registry_at(place, level)
    failures = iter([raise_error, raise_error])
    started = threading.Event()

    def work(ordered: str) -> None:
        if not started.is_set():
            started.set()
            wait_for_others(place)
        next(failures, lambda: None)()

    shop = Shop(registry, work)
    app = protect(shop, registry)
    replies: list[Reply] = []
    failed: list[int] = []

    def client(number: int) -> None:
        try:
            replies.append(order(app))
        except AppError:
            failed.append(number)

    race(8, client)

    assert len(failed) == 2
    assert [reply.status for reply in replies] == ["201 Created"] * 6
    assert sum(not reply.is_replayed for reply in replies) == 1
    assert shop.calls == 3
    assert place.notes() == ["tea"]


def wait_for_others(place: Place, number: int = 2) -> None:
    """Wait until so many requests wait for the one that calls this, where that can be seen."""
    if place.name == "sqlite":
        return
    waiting = {
        "postgresql": "SELECT count(*) FROM pg_locks WHERE NOT granted",
        "mysql": "SELECT count(*) FROM information_schema.innodb_trx"
        " WHERE trx_state = 'LOCK WAIT'",
    }[place.name]

    def is_waiting() -> bool:
        with place.observer.connect() as connection:
            return bool((connection.scalar(text(waiting)) or 0) >= number)

    # InnoDB refreshes that table only if it was not read for 0.1 seconds.
    wait_until(is_waiting, f"{number} requests wait", pause=0.25)


# -- not waiting ----------------------------------------------------------------------------------


class Held:
    """Work that goes on until it is let go."""

    def __init__(self) -> None:
        self.running = threading.Event()
        self.go_on = threading.Event()

    def __call__(self, ordered: str) -> None:
        if not self.running.is_set():
            self.running.set()
            assert self.go_on.wait(PATIENCE)

    @contextlib.contextmanager
    def during(self, app: WSGIApplication) -> Iterator[list[Reply]]:
        """Let a request run for as long as the block, and yield what its client gets."""
        replies: list[Reply] = []
        thread = threading.Thread(target=lambda: replies.append(order(app)))
        thread.start()
        assert self.running.wait(PATIENCE)
        try:
            yield replies
        finally:
            self.go_on.set()
            thread.join(PATIENCE)


def test_a_running_request_is_not_waited_for(server: Place) -> None:
    """With ``wait=False`` the client gets a 409 at once, and comes again later."""
    registry = server.registry()
    held = Held()
    shop = Shop(registry, held)
    app = protect(shop, registry, wait=False)

    with held.during(app) as replies:
        refused = order(app)
        other = order(app, key="another key")
    again = order(app)

    assert (refused.status, refused.code) == ("409 Conflict", "in_progress")
    assert refused.headers["Retry-After"] == "1"
    assert other.status == replies[0].status == "201 Created"
    assert (again.is_replayed, again.body) == (True, replies[0].body)
    assert server.notes() == ["tea", "tea"]


def test_two_replays_do_not_wait_for_each_other(server: Place) -> None:
    """With ``wait=False``, what is stored is sent, though another replay has not ended."""
    registry = server.registry()
    app = protect(Shop(registry), registry, wait=False)
    order(app)
    inner: list[Reply] = []

    def asks_again(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        result = Idempotency(Shop(registry), registry, KEYS, principal=user_of, wait=False)(
            environ, start_response
        )
        inner.append(order(app))
        return result

    outer = order(SessionMiddleware(asks_again, registry))

    assert outer.is_replayed
    assert inner[0].is_replayed


def make_impatient(server: Place) -> None:
    """Let the engine that was made last wait for locks for a short time only."""
    statement = {
        "postgresql": "SET lock_timeout = '50ms'",
        "mysql": "SET innodb_lock_wait_timeout = 1",
    }[server.name]

    def connect(connection: Any, record: object) -> None:
        cursor = connection.cursor()
        cursor.execute(statement)
        cursor.close()
        connection.commit()

    event.listen(server.engines[-1], "connect", connect)


def test_a_second_request_waits_as_long_as_the_database_does(server: Place) -> None:
    """When a lock timeout ends the wait, the first one still runs: 409."""
    registry = server.registry()
    held = Held()
    app = protect(Shop(registry, held), registry)
    impatient = server.registry()
    make_impatient(server)
    inserts: list[str] = []

    def note(*arguments: Any) -> None:
        if "INSERT" in arguments[2]:
            inserts.append(arguments[2])

    event.listen(server.engines[-1], "before_cursor_execute", note)

    with held.during(app):
        refused = order(protect(Shop(impatient), impatient))

    assert (refused.status, refused.code) == ("409 Conflict", "in_progress")
    assert len(inserts) == 1, "it waits once"
    assert server.notes() == ["tea"]


@pytest.mark.parametrize(
    ("version", "prefix"),
    [
        pytest.param(
            "10.11.2-MariaDB", "SET STATEMENT innodb_lock_wait_timeout=0 FOR ", id="MariaDB"
        ),
        pytest.param("8.4.0", "", id="MySQL, where it waits"),
    ],
)
def test_only_mariadb_takes_a_timeout_for_one_statement(version: str, prefix: str) -> None:
    """What is sent to a server that is not there; another test sends it to MariaDB."""
    dialect: Any = mysql.dialect()
    dialect.server_version_info = dialect._parse_server_version(version)

    statement = str(_NoWaitInsert(KEYS).compile(dialect=dialect))

    assert statement.startswith(f"{prefix}INSERT INTO idempotency_key ")


def test_after_a_rollback_a_running_request_is_not_waited_for_forever(server: Place) -> None:
    """The application rolled back, another request took the key and still runs: 409."""
    held = Held()
    other, registry = server.registry(), server.registry()
    winner = protect(Shop(other, held), other)
    with contextlib.ExitStack() as stack:

        def lose(ordered: str) -> None:
            registry.rollback()
            stack.enter_context(held.during(winner))
            registry.add(Note(text="too late"))

        make_impatient(server)
        refused = order(protect(Shop(registry, lose), registry))

    assert refused.code == "in_progress"
    assert order(winner).is_replayed
    assert server.notes() == ["tea"]


def test_after_a_rollback_a_lost_race_is_run_again(postgres: Place) -> None:
    """A key that was taken after the snapshot is a serialization failure."""
    registry = postgres.registry(isolation_level="REPEATABLE READ")
    other = postgres.registry()
    winner = protect(Shop(other), other)

    def lose(ordered: str) -> None:
        registry.rollback()
        count_notes(registry)
        race(1, lambda number: order(winner))

    shop = Shop(registry, lose)
    app = RetryMiddleware(protect(shop, registry), backoff=0)

    assert order(app).is_replayed
    assert shop.calls == 1
    assert postgres.notes() == ["tea"]


def test_a_locked_sqlite_database_is_an_error(sqlite: Place) -> None:
    """It says nothing about the key: any request that writes may be the reason."""
    engine = sqlite.engine()
    registry = sqlite.registry()
    app = protect(Shop(registry), registry)
    event.listen(
        sqlite.engines[-1],
        "connect",
        lambda connection, record: connection.execute("PRAGMA busy_timeout = 10"),
    )

    with engine.begin() as connection:
        connection.execute(Note.__table__.insert())  # type: ignore[attr-defined]
        with pytest.raises(OperationalError, match="locked"):
            order(app)


# -- a transaction that was begun before ----------------------------------------------------------


def reading(app: WSGIApplication, registry: scoped_session[Session], then: Any) -> WSGIApplication:
    """Make a middleware that reads from the database, and does something else, first."""

    def middleware(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        count_notes(registry)
        then()
        return app(environ, start_response)

    return middleware


def begun_before(
    place: Place, level: str, *, retry: bool = False, **options: Any
) -> tuple[Any, Shop]:
    """Make an application whose transaction is begun, and whose key then is used by another."""
    registry = registry_at(place, level)
    other = registry_at(place, level)
    shop = Shop(registry)
    winner = protect(Shop(other), other)
    # In a thread: a request inside of this one would be a part of it.
    once = iter([lambda: race(1, lambda number: order(winner))])

    def lose() -> None:
        next(once, lambda: None)()

    inner = Idempotency(shop, registry, KEYS, principal=user_of)
    app: Any = SessionMiddleware(reading(inner, registry, lose), registry, **options)
    if retry:
        app = RetryMiddleware(app, backoff=0)
    return app, shop


def test_a_snapshot_that_is_too_old_for_the_stored_response_is_a_conflict(
    postgres: Place,
) -> None:
    """The transaction is not the middleware's to roll back, so the client comes again."""
    for level in LEVELS[1:]:
        postgres.create()
        app, shop = begun_before(postgres, level)

        refused = order(app)
        again = order(app)

        assert (refused.status, refused.code) == ("409 Conflict", "in_progress")
        assert again.is_replayed
        assert shop.calls == 0
        assert postgres.notes() == ["tea"]


def test_without_a_veto_a_conflict_is_rolled_back_all_the_same(postgres: Place) -> None:
    """The database has given up this transaction, whatever its status says."""
    app, _ = begun_before(postgres, "SERIALIZABLE", commit_veto=None)

    assert order(app).code == "in_progress"
    assert order(app).is_replayed
    assert postgres.notes() == ["tea"]


@pytest.mark.parametrize("level", LEVELS)
def test_with_retry_a_snapshot_that_is_too_old_is_not_noticed(server: Place, level: str) -> None:
    """The second attempt sees the stored response."""
    if (server.name, level) == ("mysql", "SERIALIZABLE"):
        return  # there the first read makes the other request wait for this one
    app, shop = begun_before(server, level, retry=True)

    assert order(app).is_replayed
    assert shop.calls == 0
    assert server.notes() == ["tea"]


def test_at_read_committed_the_stored_response_is_seen(server: Place) -> None:
    """Each statement sees what was committed before it."""
    app, shop = begun_before(server, "READ COMMITTED")

    assert order(app).is_replayed
    assert shop.calls == 0


@pytest.mark.clusters
def test_mariadb_sees_the_stored_response_in_spite_of_its_snapshot(maria: Place) -> None:
    """At REPEATABLE READ a locking read sees the latest row."""
    app, shop = begun_before(maria, "REPEATABLE READ")

    assert order(app).is_replayed
    assert shop.calls == 0


@pytest.mark.clusters
@pytest.mark.parametrize("retry", [False, True], ids=["without retry", "with retry"])
def test_mariadb_with_snapshot_isolation_calls_it_a_conflict(retry: bool, maria: Place) -> None:
    """That is error 1020, the default from 11.6.2 on."""
    with maria.observer.connect() as connection:
        found = connection.execute(text("SHOW VARIABLES LIKE 'innodb_snapshot_isolation'"))
        if found.first() is None:
            pytest.skip("THIS MARIADB HAS NO innodb_snapshot_isolation")
    app, shop = begun_before(maria, "REPEATABLE READ", retry=retry)

    def isolate(connection: Any, record: object) -> None:
        connection.cursor().execute("SET innodb_snapshot_isolation = ON")

    for engine in maria.engines:
        event.listen(engine, "connect", isolate)

    if not retry:
        assert order(app).code == "in_progress"
    assert order(app).is_replayed
    assert shop.calls == 0
    assert maria.notes() == ["tea"]


def test_what_was_begun_before_is_kept(every_place: Place) -> None:
    """A request that is replayed commits what a middleware around it wrote."""
    registry = every_place.registry()

    def audit() -> None:
        registry.add(Note(text="audit"))
        registry.flush()

    shop = Shop(registry)
    inner = Idempotency(shop, registry, KEYS, principal=user_of)
    app = SessionMiddleware(reading(inner, registry, audit), registry)

    assert not order(app).is_replayed
    assert order(app).is_replayed
    assert every_place.notes() == ["audit", "audit", "tea"]
    assert shop.calls == 1


# -- lost races of the application itself ---------------------------------------------------------


def test_a_request_that_lost_a_race_is_run_again_and_stored(postgres: Place) -> None:
    """RetryMiddleware goes around both; each attempt claims the key anew."""
    registry = postgres.registry(isolation_level="SERIALIZABLE")
    other = postgres.registry(isolation_level="SERIALIZABLE")
    meeting = threading.Barrier(2, timeout=PATIENCE)

    def work(ordered: str) -> None:
        notes = registry.scalars(select(Note.text)).all()
        if len(notes) == 1:
            meeting.wait()

    shop = Shop(registry, work)
    app = RetryMiddleware(protect(shop, registry), backoff=0)
    replies: list[Reply] = []

    race(2, lambda number: replies.append(order(app, f"{number}".encode(), key=f"{number}")))

    assert [reply.status for reply in replies] == ["201 Created"] * 2
    assert shop.calls == 3
    assert postgres.notes() == ["0", "1"]
    assert postgres.keys() == ["201 Created"] * 2
    assert order(protect(shop, other), b"0", key="0").is_replayed
    assert order(app, b"1", key="1").is_replayed


def test_a_retried_request_reads_its_body_again(postgres: Place) -> None:
    """What the first attempt has read, the fingerprint of the second reads again."""
    app, _ = begun_before(postgres, "REPEATABLE READ", retry=True)

    assert order(app).is_replayed
    assert order(app, b"coffee").code == "key_reused"


def test_a_key_is_found_when_the_purge_comes_between(postgres: Place) -> None:
    """The row is gone between the conflict and the look at it: the request runs."""
    registry = postgres.registry()
    shop = Shop(registry)
    app = protect(shop, registry)
    order(app)
    purges = iter([None])

    def purge(*arguments: Any) -> None:
        statement: str = arguments[2]
        if statement.startswith("SELECT idempotency_key") and next(purges, 1) is None:
            with postgres.observer.begin() as connection:
                connection.execute(KEYS.delete())

    event.listen(postgres.engines[-1], "before_cursor_execute", purge)

    assert not order(app).is_replayed
    assert shop.calls == 2
    assert order(app, key=KEY).is_replayed


@pytest.mark.parametrize(
    "when", ["after write()", "before the last block", "after it", "in close()"]
)
def test_a_key_that_was_taken_keeps_every_database_from_committing(
    when: str, postgres: Place
) -> None:
    """A response lost its key by a rollback: that is known before the first commit."""
    other, registry = postgres.registry(), postgres.registry()

    def lose_the_key() -> None:
        registry.rollback()
        assert order(protect(Shop(registry), registry)).status == "201 Created"
        other.add(Note(text="too late"))
        registry.add(Note(text="too late"))

    class Stream(list[bytes]):
        def __iter__(self) -> Iterator[bytes]:
            yield b"a"
            if when == "before the last block":
                lose_the_key()
            yield b"b"
            if when == "after it":
                lose_the_key()

        def close(self) -> None:
            if when == "in close()":
                lose_the_key()

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        length = [("Content-Length", "2")] if when == "before the last block" else []
        write = start_response("200 OK", length)
        if when == "after write()":
            write(b"a")
            lose_the_key()
            return FileWrapper(io.BytesIO(b"b"))
        return Stream()

    inner = Idempotency(app, registry, KEYS, principal=user_of, max_response=1)
    moment: Any = "close" if when == "in close()" else "complete"
    with pytest.raises(Exception, match="took the Idempotency-Key"):
        order(SessionMiddleware(inner, other, registry, commit_on=moment))
    assert postgres.notes() == ["tea"]
