"""Three nodes of MariaDB Galera: conflicts, lost updates, lost nodes, and a bank on all."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pymysql
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, OperationalError
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

from tests.clusters.bank import ACKNOWLEDGED, ROLLED_BACK, UNKNOWN, Bank, Load, audit, protect
from tests.support.galera import Galera, MariaDBServer, galera
from tests.support.processes import wait_until
from tests.support.wsgi import drive, make_registry
from wsgi_dbsession import Scope, SessionMiddleware, current_scope, session_scope
from wsgi_dbsession.retry import is_retryable, run_transaction

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from sqlalchemy import Engine
    from sqlalchemy.orm import Session, scoped_session

    MakeSession = Callable[..., scoped_session[Session]]

pytestmark = [pytest.mark.clusters, pytest.mark.xdist_group("galera")]

ROOT = Path(__file__).parents[2]
NODES = 3


@pytest.fixture(scope="module")
def cluster() -> Iterator[Galera]:
    with galera(NODES) as made:
        yield made


@pytest.fixture(autouse=True)
def whole(cluster: Galera) -> Iterator[None]:
    """Each test begins with all nodes, and without the settings of the test before."""
    cluster.wait_size(NODES)
    yield
    for node in cluster.nodes:
        if node.process.is_running():
            node.thaw()
        else:
            cluster.join(node)
    cluster.wait_size(NODES)
    for node in cluster.nodes:
        node.fetch("SET GLOBAL innodb_snapshot_isolation = OFF")


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    """What the code of ``docs/galera.md`` defines, with shorter timeouts."""
    parser = PythonCodeBlockParser()
    document = Sybil([parser], path=str(ROOT)).parse(ROOT / "docs" / "galera.md")
    next(iter(document.examples())).evaluate()
    document.namespace["TIMEOUTS"] = {
        "connect_timeout": 1,
        "read_timeout": 2,
        "write_timeout": 2,
    }
    return document.namespace


@pytest.fixture
def make_session(recipe: dict[str, Any], cluster: Galera) -> Iterator[MakeSession]:
    """Make session registries over the engine of the documentation."""
    engines: list[Engine] = []

    def make(
        own: int = 0, known: int = NODES, read_timeout: float = 2, **options: Any
    ) -> scoped_session[Session]:
        nodes = [(node.host, node.port) for node in cluster.nodes]
        engine: Engine = recipe["make_engine"](
            (nodes[own:] + nodes[:own])[:known],
            {"user": "root", "database": "test", "read_timeout": read_timeout},
            **{"pool_size": 4, **options},
        )
        engines.append(engine)
        return make_registry(engine)

    yield make
    pools: list[Any] = [engine.pool for engine in engines]
    left = sum(pool.checkedout() for pool in pools)
    for engine in engines:
        engine.dispose()
    assert left == 0, f"{left} connections were not returned to the pool"


# A node that was frozen, or has lost others that were, believes for a moment that nothing has
# happened. What is asked then is refused, or waits in vain: before it is executed.
BEFORE_EXECUTION = {1205, 1047}


def fetch_from(node: MariaDBServer) -> Callable[[str], list[tuple[Any, ...]]]:
    def fetch(query: str) -> list[tuple[Any, ...]]:
        deadline = time.monotonic() + 60
        while True:
            try:
                return fetch_once(query)
            except pymysql.err.OperationalError as error:
                if error.args[0] not in BEFORE_EXECUTION or time.monotonic() > deadline:
                    raise
            time.sleep(0.1)

    def fetch_once(query: str) -> list[tuple[Any, ...]]:
        with (
            contextlib.closing(node.connect("test")) as connection,
            connection.cursor() as cursor,
        ):
            # All that was acknowledged, on whichever node.
            cursor.execute("SET SESSION wsrep_sync_wait = 15")
            cursor.execute(query)
            return list(cursor.fetchall())

    return fetch


def open_banks(cluster: Galera, make_session: MakeSession, **options: Any) -> list[Bank]:
    """Make the same bank once for each node, as three web servers would."""
    engine_options = options.pop("engine_options", {})
    banks = [Bank(make_session(number, **engine_options), **options) for number in range(NODES)]
    banks[0].open(fetch_from(cluster.nodes[0]))
    for node in cluster.nodes:
        fetch_from(node)("SELECT * FROM account")
    return banks


def make_note_table(cluster: Galera) -> None:
    fetch = fetch_from(cluster.nodes[0])
    fetch("DROP TABLE IF EXISTS note")
    fetch("CREATE TABLE note (id int PRIMARY KEY, text varchar(40) NOT NULL)")
    fetch("INSERT INTO note VALUES (1, ''), (2, '')")
    for node in cluster.nodes:
        fetch_from(node)("SELECT * FROM note")


@contextlib.contextmanager
def transaction(node: MariaDBServer, level: str = "REPEATABLE READ") -> Iterator[Any]:
    """Begin a transaction on a node, without SQLAlchemy, and give a function that runs SQL."""
    with contextlib.closing(
        pymysql.connect(
            host=node.host, port=node.port, user="root", database="test", read_timeout=30
        )
    ) as connection:

        def run(statement: str) -> tuple[tuple[Any, ...], ...]:
            with connection.cursor() as cursor:
                cursor.execute(statement)
                rows: tuple[tuple[Any, ...], ...] = cursor.fetchall()
                return rows

        run(f"SET SESSION TRANSACTION ISOLATION LEVEL {level}")
        run("BEGIN")
        yield run


# -- conflicts ------------------------------------------------------------------------------------


def test_a_conflict_at_a_statement_is_retried(cluster: Galera, make_session: MakeSession) -> None:
    """Another node's write of the same row ends the transaction before its next statement."""
    make_note_table(cluster)
    registry = make_session(0)
    failures: list[int] = []

    def job() -> None:
        registry.execute(text("UPDATE note SET text = CONCAT(text, 'mine') WHERE id = 1"))
        if not failures:
            other, own = cluster.nodes[1], cluster.nodes[0]
            other.fetch("UPDATE test.note SET text = 'theirs' WHERE id = 1")
            # Applied on the own node, the own transaction is in its way.
            wait_until(
                lambda: own.value("SELECT text FROM test.note WHERE id = 1") == "theirs",
                "the write arrives",
            )
            with pytest.raises(OperationalError) as caught:
                registry.execute(text("SELECT 1 FROM note"))
            failures.append(caught.value.orig.args[0])  # type: ignore[union-attr]
            raise caught.value

    run_transaction(job, registry)

    assert failures == [1213]
    assert cluster.nodes[2].value("SELECT /* waits */ text FROM test.note WHERE id = 1") in {
        "theirs",
        "theirsmine",
    }
    assert fetch_from(cluster.nodes[2])("SELECT text FROM note WHERE id = 1") == [("theirsmine",)]


def test_conflicts_arrive_at_statements_and_at_commit(
    cluster: Galera, make_session: MakeSession
) -> None:
    """Without the retry clients see them; the books are right, with what they were told."""
    banks = open_banks(cluster, make_session, accounts=4, attempts=1)

    with Load(banks, 9) as load:
        load.run_until(100)

    audit(banks[0], load, fetch_from(cluster.nodes[0]))
    at_statements = load.errors["OperationalError 1213 at a statement"]
    at_commit = load.errors["OperationalError 1213 at COMMIT or connect"]
    assert at_statements > 0
    assert at_commit > 0
    assert at_statements + at_commit == sum(load.errors.values())


def test_with_the_retry_no_conflict_reaches_a_client(
    cluster: Galera, make_session: MakeSession
) -> None:
    """The same, with as many attempts as it takes."""
    banks = open_banks(cluster, make_session, accounts=4, attempts=100)

    with Load(banks, 9) as load:
        load.run_until(100)

    assert not load.errors
    audit(banks[0], load, fetch_from(cluster.nodes[0]))


# -- isolation levels -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "snapshots", "safe"),
    [
        ("READ COMMITTED", "OFF", False),
        ("REPEATABLE READ", "OFF", False),
        ("REPEATABLE READ", "ON", True),
        ("SERIALIZABLE", "OFF", True),
    ],
)
def test_a_value_that_was_read_before_is_overwritten(
    level: str, snapshots: str, safe: bool, cluster: Galera, make_session: MakeSession
) -> None:
    """Another node's write in between is lost, unless the server looks for that."""
    make_note_table(cluster)
    for node in cluster.nodes:
        node.fetch(f"SET GLOBAL innodb_snapshot_isolation = {snapshots}")
    registry = make_session(0, isolation_level=level)
    attempts: list[None] = []

    def job() -> None:
        attempts.append(None)
        found = registry.scalar(text("SELECT text FROM note WHERE id = 1"))
        if len(attempts) == 1:
            cluster.nodes[1].fetch("UPDATE test.note SET text = 'theirs ' WHERE id = 1")
            if level != "SERIALIZABLE":  # which waits for this transaction, or ends it
                wait_until(
                    lambda: cluster.nodes[0].value("SELECT text FROM test.note WHERE id = 1"),
                    "the write arrives",
                )
        registry.execute(
            text("UPDATE note SET text = :text WHERE id = 1"), {"text": f"{found}mine"}
        )

    run_transaction(job, registry, attempts=10)

    expected = "theirs mine" if safe else "mine"
    assert fetch_from(cluster.nodes[2])("SELECT text FROM note WHERE id = 1") == [(expected,)]
    assert len(attempts) == (2 if safe else 1)


@pytest.mark.parametrize(("snapshots", "level"), [("ON", None), ("OFF", "SERIALIZABLE")])
def test_a_bank_that_reads_first_keeps_its_sum(
    snapshots: str, level: str | None, cluster: Galera, make_session: MakeSession
) -> None:
    """With either of the two ways out, and the retry."""
    for node in cluster.nodes:
        node.fetch(f"SET GLOBAL innodb_snapshot_isolation = {snapshots}")
    options = {"isolation_level": level} if level else {}
    banks = open_banks(
        cluster,
        make_session,
        accounts=4,
        attempts=100,
        reads_first=True,
        engine_options=options,
    )

    with Load(banks, 6) as load:
        load.run_until(60)

    assert not load.errors
    audit(banks[0], load, fetch_from(cluster.nodes[0]))


def leave_both(nodes: list[MariaDBServer], *, guarded: bool) -> int:
    """Let two doctors leave at once if the other one stays; return how many are left."""
    fetch = fetch_from(nodes[0])
    fetch("UPDATE note SET text = 'on call'")
    for node in nodes:
        fetch_from(node)("SELECT 1")
    meeting = threading.Barrier(len(nodes), timeout=30)
    errors: list[pymysql.err.OperationalError] = []

    def leave(node: MariaDBServer, own: int, other: int) -> None:
        with transaction(node, "SERIALIZABLE") as run:
            try:
                ((text,),) = run(f"SELECT text FROM note WHERE id = {other}")
                assert text == "on call"
                meeting.wait()
                if guarded:
                    run("UPDATE roster SET version = version + 1")
                run(f"UPDATE note SET text = 'away' WHERE id = {own}")
                meeting.wait()
                run("COMMIT")
            except pymysql.err.OperationalError as error:
                errors.append(error)
                meeting.abort()
            except threading.BrokenBarrierError:
                run("ROLLBACK")

    threads = [
        threading.Thread(target=leave, args=[node, number, 3 - number])
        for number, node in enumerate(nodes, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(map(is_retryable, errors)), errors
    left: int = fetch("SELECT count(*) FROM note WHERE text = 'on call'")[0][0]
    return left


def test_serializable_is_not_so_across_nodes(cluster: Galera) -> None:
    """A rule over two rows is broken, unless the transactions write a row in common."""
    make_note_table(cluster)
    fetch = fetch_from(cluster.nodes[0])
    fetch("CREATE OR REPLACE TABLE roster (id int PRIMARY KEY, version int NOT NULL)")
    fetch("INSERT INTO roster VALUES (1, 0)")
    one, two, _ = cluster.nodes

    # Half of the pairs break the rule.
    assert any(leave_both([one, two], guarded=False) == 0 for _ in range(100))
    assert all(leave_both([one, one], guarded=False) > 0 for _ in range(5))
    assert all(leave_both([one, two], guarded=True) > 0 for _ in range(10))


def test_reads_on_another_node_are_stale_unless_they_wait(cluster: Galera) -> None:
    """``wsrep_sync_wait``, at any isolation level."""
    make_note_table(cluster)
    one, two, _ = cluster.nodes
    look = "SELECT text FROM note WHERE id = 1"
    with (
        contextlib.closing(two.connect("test")) as blocking,
        transaction(two, "SERIALIZABLE") as stale,
        transaction(two, "SERIALIZABLE") as waiting,
    ):
        waiting("COMMIT")
        waiting("SET SESSION wsrep_sync_wait = 1")
        with blocking.cursor() as cursor:
            cursor.execute("FLUSH TABLES WITH READ LOCK")  # holds back what others have written
            one.fetch("UPDATE test.note SET text = 'written' WHERE id = 1")

            assert stale(look) == (("",),)
            stale("COMMIT")

            seen: list[object] = []
            thread = threading.Thread(target=lambda: seen.append(waiting(look)))
            thread.start()
            thread.join(0.3)
            assert not seen
            cursor.execute("UNLOCK TABLES")
            thread.join(30)
            assert seen == [(("written",),)]


# -- lost nodes -----------------------------------------------------------------------------------


def thaw(*nodes: MariaDBServer) -> None:
    for node in nodes:
        node.thaw()


def writer(work: Callable[[], object]) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        work()
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"done"]

    return app


@pytest.mark.parametrize("seconds", [2.0, 3.5])
def test_a_commit_without_the_others_is_unknown(
    seconds: float, cluster: Galera, make_session: MakeSession
) -> None:
    """Error 1180: the row is committed or not, depending on when the others come back.

    The request is not run again, and no client is told that it was rolled back.
    """
    make_note_table(cluster)
    # The COMMIT takes longer than a frozen node's clients should wait, and is answered.
    registry = make_session(0, read_timeout=30, pool_size=1)
    _, two, three = cluster.nodes
    scopes: list[Scope] = []
    thawing = threading.Timer(seconds, thaw, [two, three])

    def work() -> None:
        scopes.append(current_scope())
        registry.execute(text("INSERT INTO note VALUES (3, 'written')"))
        two.freeze()
        three.freeze()
        thawing.start()

    app = protect(SessionMiddleware(writer(work), registry), 5)
    error: DBAPIError | None = None
    try:
        drive(app, "POST")
    except DBAPIError as caught:
        error = caught
    finally:
        thawing.join()
    cluster.wait_size(NODES)

    assert len(scopes) == 1
    rows = fetch_from(two)("SELECT text FROM note WHERE id = 3")
    if error is None:  # on a busy machine they may be back before they are missed
        assert (seconds, rows) == (2.0, [("written",)])
    else:
        assert error.orig is not None
        assert error.orig.args[0] in {1180, 1047}
        assert scopes[0].reason == UNKNOWN
        assert rows in ([], [("written",)])
    print(f"{seconds} s: {error and error.orig}, {rows}")


def test_a_node_that_is_alone_is_left_at_its_first_statement(
    cluster: Galera, make_session: MakeSession
) -> None:
    """Error 1047 at a statement: the request is run again until there is a cluster."""
    make_note_table(cluster)
    one, two, three = cluster.nodes
    # The others, once they are back, believe for a moment that nothing has happened.
    registry = make_session(0, known=1)
    attempts: list[None] = []

    def work() -> None:
        attempts.append(None)
        registry.execute(text("INSERT INTO note VALUES (3, 'written')"))

    app = protect(SessionMiddleware(writer(work), registry), 100)
    with session_scope(registry):
        registry.connection()  # the pool has one to the own node
    two.freeze()
    three.freeze()
    wait_until(lambda: one.status("wsrep_ready") == "OFF", "the node finds that it is alone")
    thawing = threading.Timer(1, thaw, [two, three])
    thawing.start()

    assert drive(app, "POST").status == "200 OK"

    thawing.join()
    assert len(attempts) > 1
    cluster.wait_size(NODES)
    assert fetch_from(two)("SELECT text FROM note WHERE id = 3") == [("written",)]


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_no_lost_node_loses_or_repeats_a_transfer(
    how: str, cluster: Galera, make_session: MakeSession
) -> None:
    """What was acknowledged is in the books, once; what failed is not; the sum is kept.

    The clients see no other errors than those of which the outcome is unknown.
    """
    banks = open_banks(cluster, make_session, attempts=100)
    victim = cluster.nodes[2]

    with Load(banks, 9) as load:
        load.run_until(50)
        if how == "killed":
            victim.kill()
            load.run_until(50)
            cluster.join(victim)
        else:
            victim.freeze()
            time.sleep(4)
            victim.thaw()
        load.run_until(50)

    cluster.wait_size(NODES)
    for node in cluster.nodes:
        audit(banks[0], load, fetch_from(node))
    assert load.count(ACKNOWLEDGED) >= 150
    assert load.count(ROLLED_BACK) == 0, load.errors
