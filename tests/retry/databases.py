"""Engines, and triggers that run in a COMMIT."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError

from tests.support.models import Note, make_engine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytest
    from sqlalchemy import URL, Engine
    from sqlalchemy.orm import Session, scoped_session

    from tests.support.models import Database


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


@contextlib.contextmanager
def engine_of(url: URL, driver: str) -> Iterator[Engine]:
    """Make an engine without ``pool_pre_ping``, that leaves no broken socket behind."""
    engine = make_engine(url.set(drivername=f"postgresql+{driver}"))
    sockets: list[Any] = []

    def keep(connection: object, _: object) -> None:
        # pg8000 forgets them, not closed, where it cannot say goodbye to the server.
        sockets.extend(getattr(connection, name, None) for name in ("_sock", "_usock"))

    event.listen(engine, "connect", keep)
    try:
        yield engine
    finally:
        engine.dispose()
        for each in sockets:
            with contextlib.suppress(OSError):
                if each is not None:
                    each.close()


def race_of(one: Engine, *statements: str) -> list[BaseException]:
    """Run transactions of two statements, that meet between them, and return their errors."""
    meeting = threading.Barrier(2, timeout=60)
    errors: list[BaseException] = []

    def run(first: str, second: str) -> None:
        try:
            with one.connect() as connection:
                try:
                    connection.execute(text(first))
                finally:
                    meeting.wait()
                connection.execute(text(second))
                connection.commit()
        except DBAPIError as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=statements[i : i + 2]) for i in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return errors


def add_note(registry: scoped_session[Session]) -> None:
    registry.add(Note(text="note"))
    registry.flush()


class Proxy:
    """Stands between a client and a database, and breaks the connection at a COMMIT.

    The server gets the COMMIT; the client does not get the answer.
    """

    POSTGRESQL = b"C\x00\x00\x00\x0bCOMMIT\x00"  # in the server's answer
    MYSQL = b"\x03COMMIT"  # in the client's command

    def __init__(self, host: str, port: int, commit: bytes) -> None:
        self.commits = 0
        self._commit = commit
        self._target = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            broken = threading.Event()
            for source, sink in ((client, server), (server, client)):
                threading.Thread(
                    target=self._copy, args=(source, sink, broken, source is client), daemon=True
                ).start()

    def _copy(
        self, source: socket.socket, sink: socket.socket, broken: threading.Event, is_client: bool
    ) -> None:
        with source, sink, contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if self._commit in data:
                    self.commits += 1
                    broken.set()
                if broken.is_set() and not is_client:
                    break
                sink.sendall(data)
            for each in (source, sink):
                each.shutdown(socket.SHUT_RDWR)


def assert_unknown(
    caplog: pytest.LogCaptureFixture, error: BaseException, what: str = "POST /path"
) -> None:
    assert "Outcome unknown: the transaction may have been committed." in str(error)
    assert any(
        record.levelname == "ERROR"
        and what in record.getMessage()
        and "unknown" in record.getMessage()
        for record in caplog.records
    )


def do_at_commit(connection: Any, statement: str) -> None:
    """Let every COMMIT of a new author do something on the server."""
    for each in (
        f"""CREATE OR REPLACE FUNCTION at_commit() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN {statement}; RETURN NULL; END $$""",
        """CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON author
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION at_commit()""",
    ):
        connection.exec_driver_sql(each)


@contextlib.contextmanager
def trigger_at_commit(database: Database, statement: str) -> Iterator[None]:
    """Let every COMMIT of a new author do something on the server, in this block."""
    with database.observer.begin() as connection:
        do_at_commit(connection, statement)
    try:
        yield
    finally:
        with database.observer.begin() as connection:
            connection.exec_driver_sql("DROP TRIGGER at_commit ON author")
