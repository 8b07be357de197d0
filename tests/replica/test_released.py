"""After a ``released()`` block a transaction chooses its engine again, and misses nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_engine, func, select, text
from sqlalchemy.orm import scoped_session, sessionmaker

from tests.replica.application import PORT
from tests.replica.site import Site, behind, retrying
from tests.replica.tables import Note, empty_tables
from wsgi_dbsession import current_scope, session_scope
from wsgi_dbsession.replica import read_only_engine, session_class

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sqlalchemy import Engine
    from sqlalchemy.orm import Session

    from tests.replica.site import Keep

pytestmark = [pytest.mark.promise("released"), pytest.mark.xdist_group("replica")]

NO_STATEMENT = "no statement may run in the released"


def checked_out(*engines: Engine) -> list[int]:
    pools: list[Any] = [engine.pool for engine in engines]
    return [pool.checkedout() for pool in pools]


@pytest.fixture
def primary(tmp_path: Path, keep: Keep) -> Engine:
    """A SQLite file with one note."""
    made = keep(create_engine(f"sqlite:///{tmp_path / 'test.db'}"))
    empty_tables(made.url)
    with made.begin() as connection:
        connection.execute(Note.__table__.insert().values(text="there"))  # type: ignore[attr-defined]
    return made


@pytest.fixture
def reads(primary: Engine, keep: Keep) -> Engine:
    return keep(read_only_engine(primary))


@pytest.fixture
def registry(primary: Engine, reads: Engine) -> scoped_session[Session]:
    kind = session_class(primary, reads)
    return scoped_session(sessionmaker(class_=kind), scopefunc=current_scope)


def test_a_read_only_connection_is_given_back(
    registry: scoped_session[Session], primary: Engine, reads: Engine
) -> None:
    """The Session was given it, and does not close it by itself."""
    with session_scope(registry, read_only=True) as scope:
        note = registry.scalars(select(Note)).one()
        assert checked_out(primary, reads) == [0, 1]
        with scope.released():
            assert checked_out(primary, reads) == [0, 0]
            with pytest.raises(RuntimeError, match=NO_STATEMENT):
                registry.scalar(text("SELECT 1"))
            assert checked_out(primary, reads) == [0, 0]
        assert note.text == registry.scalar(select(Note.text))
        assert checked_out(primary, reads) == [0, 1]


@pytest.mark.parametrize("first", [True, False], ids=["reads, writes", "writes, reads"])
def test_the_next_transaction_chooses_again(
    registry: scoped_session[Session], primary: Engine, reads: Engine, first: bool
) -> None:
    """A job that reads, waits and writes says so before each part."""
    with session_scope(registry) as scope:
        scope.read_only = first
        registry.scalars(select(Note)).one()
        assert checked_out(primary, reads) == [int(not first), int(first)]
        with scope.released():
            scope.read_only = not first
        registry.scalar(text("SELECT 1"))
        assert checked_out(primary, reads) == [int(first), int(not first)]


def test_an_object_from_the_replica_is_written_by_the_primary(
    registry: scoped_session[Session], primary: Engine
) -> None:
    """It belongs to the Session, not to the connection that loaded it."""
    with session_scope(registry, read_only=True) as scope:
        note = registry.scalars(select(Note)).one()
        with scope.released():
            scope.read_only = False
        note.text = "changed"

    with primary.connect() as connection:
        assert connection.scalars(select(Note.text)).all() == ["changed"]


def test_a_refused_write_keeps_the_block_from_beginning(
    registry: scoped_session[Session],
) -> None:
    """What the replica refused would be lost."""
    with pytest.raises(Exception, match="readonly"), session_scope(registry, read_only=True) as s:
        try:
            registry.execute(text("DELETE FROM note"))
        finally:
            with pytest.raises(RuntimeError, match="something was written"):
                s.released().__enter__()


def test_a_connection_whose_end_fails_is_not_read_again(
    registry: scoped_session[Session], reads: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next statement gets another one."""

    def fail(connection: object) -> None:
        raise OSError

    with session_scope(registry, read_only=True) as scope:
        registry.scalars(select(Note)).one()
        with monkeypatch.context() as patch:
            patch.setattr(reads.dialect, "do_rollback", fail)
            with scope.released():
                assert checked_out(reads) == [0]
        assert registry.scalar(text("SELECT text FROM note")) == "there"


def slow_count(site: Site) -> Callable[[], object]:
    """A view that counts and says where, before and after a slow call."""

    def count() -> str:
        found = site.registry.scalar(select(func.count()).select_from(Note))
        return f"{found} on {site.registry.scalar(PORT)}"

    def view() -> str:
        first = count()
        with current_scope().released():
            assert checked_out(site.primary, *site.engines) == [0, 0, 0]
        return f"{first}, {count()}"

    return view


def test_a_client_reads_what_it_wrote_before_and_after_the_block(site: Site) -> None:
    """From the primary while the replicas are behind, and from a replica that has caught up."""
    client = retrying(site, slow=slow_count(site))
    primary = site.cluster.primary.port
    with behind(*site.cluster.standbys):
        client.post()
        assert client.get("/slow") == f"1 on {primary}, 1 on {primary}"
    site.wait_caught_up()
    first, second = client.get("/slow").split(", ")
    assert first.startswith("1 on ")
    assert site.is_replica(first)
    assert site.is_replica(second)


def test_a_replica_that_is_behind_is_not_read_after_the_block(site: Site) -> None:
    """The cookie counts for the second transaction as for the first."""
    first, second = site.cluster.standbys
    client = retrying(site, slow=slow_count(site))
    with behind(first):
        client.post()
        site.cluster.wait_caught_up(second)
        bodies = [client.get("/slow") for _ in range(4)]

    for body in bodies:
        for part in body.split(", "):
            assert part.startswith("1 on ")
            assert part != f"1 on {first.port}"
