"""A load of requests under gevent, in a process of its own: some are killed, some time out.

``python -m gevent.monkey --module tests.core.gevent_load URL SEED`` prints what came of it, and
stays until its input ends, so that its connections can be looked at.
"""

from __future__ import annotations

import argparse
import contextvars
import gc
import json
import logging
import random
import sys
from typing import TYPE_CHECKING, Any

import gevent
from sqlalchemy import URL, Engine, create_engine, text
from sqlalchemy.orm import Session as SQLAlchemySession
from sqlalchemy.orm import scoped_session, sessionmaker
from sqlalchemy.pool import NullPool

from tests.support.models import Note, make_engine
from wsgi_dbsession import SessionMiddleware, current_scope

if TYPE_CHECKING:
    from collections.abc import Iterator

    from _typeshed.wsgi import StartResponse, WSGIEnvironment

CLIENTS = 12
REQUESTS = 300


class Load:
    """Clients that send requests, each of which writes two rows and asks for its own name."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.random = random.Random(seed)
        self.session = scoped_session(sessionmaker(engine), scopefunc=current_scope)
        self.app = SessionMiddleware(self.application, self.session)
        self.number = 0
        self.done = 0
        self.told: list[str] = []  # those whose client has a whole 201
        self.unfinished: set[str] = set()  # those whose application did not come to its end
        self.wrong: list[tuple[str, str]] = []  # the name that was asked for, and the answer
        self.ended: dict[str, int] = {}

    def application(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterator[bytes]:
        name: str = environ["PATH_INFO"]
        self.unfinished.add(name)
        self.session.add(Note(text=name))
        self.ask(name)
        start_response("201 Created", [])
        if self.random.random() < 0.5:
            yield b"created "
        if self.random.random() < 0.2:
            # As gevent's users do it: what takes too long is left out.
            with gevent.Timeout(self.random.uniform(0, 0.01), False):  # type: ignore[arg-type]  # what gevent documents
                self.session.execute(text("SELECT pg_sleep(0.005)"))
        self.session.add(Note(text=name))
        self.ask(name)
        self.unfinished.remove(name)
        yield name.encode()

    def ask(self, name: str) -> None:
        """Ask the database for one's own name, through SQLAlchemy or past it."""
        seconds = self.random.uniform(0, 0.004)
        if self.random.random() < 0.5:
            query = text("SELECT :name, pg_sleep(:seconds)")
            answer = self.session.execute(query, {"name": name, "seconds": seconds}).scalar_one()
        else:
            cursor: Any = self.session.connection().connection.cursor()
            cursor.execute("SELECT %s::text, pg_sleep(%s)", (name, seconds))
            answer = cursor.fetchone()[0]
        if answer != name:
            self.wrong.append((name, answer))

    def serve(self) -> None:
        """Be the server for one request, and the client that has all of the answer at the end."""
        self.number += 1
        name = f"/{self.number}"
        environ: WSGIEnvironment = {"REQUEST_METHOD": "POST", "PATH_INFO": name}
        head: list[str] = []

        def start_response(status: str, headers: object, exc_info: object = None, /) -> Any:
            head.append(status)
            return head.append

        result = self.app(environ, start_response)
        try:
            for _ in result:
                gevent.sleep(0)
            assert head == ["201 Created"]
            self.told.append(name)
        finally:
            close = getattr(result, "close", None)
            if close is not None:
                close()

    def client(self) -> None:
        while self.done < REQUESTS:
            self.done += 1
            try:
                if self.random.random() < 0.4:
                    with gevent.Timeout(self.random.uniform(0, 0.03)):
                        self.serve()
                else:
                    self.serve()
                how = "well"
            except gevent.Timeout:
                how = "timed out"
            except gevent.GreenletExit:
                self.count("killed")
                raise
            except Exception as error:
                how = type(error).__name__
            self.count(how)

    def count(self, how: str) -> None:
        self.ended[how] = self.ended.get(how, 0) + 1

    def run(self) -> None:
        clients = [gevent.spawn(self.client) for _ in range(CLIENTS)]
        while self.done < REQUESTS:
            gevent.sleep(self.random.uniform(0, 0.02))
            victim = self.random.randrange(CLIENTS)
            clients[victim].kill(block=False)
            clients.append(clients[victim])
            clients[victim] = gevent.spawn(self.client)
        gevent.joinall(clients, timeout=30, raise_error=True)
        assert all(client.dead for client in clients)


def interrupt_once(engine: Engine) -> str:
    """Interrupt a statement past SQLAlchemy, and return what the next request gets."""
    session = scoped_session(sessionmaker(engine), scopefunc=current_scope)
    answers: list[str] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        cursor: Any = session.connection().connection.cursor()
        query = environ["PATH_INFO"]
        with gevent.Timeout(0.2):
            cursor.execute(query)
            answers.append(cursor.fetchone()[0])
        start_response("200 OK", [])
        return []

    def start_response(status: str, headers: object, exc_info: object = None, /) -> Any:
        return answers.append

    middleware = SessionMiddleware(app, session)
    for query in ("SELECT 'first', pg_sleep(0.6)", "SELECT 'second'"):
        environ: WSGIEnvironment = {"REQUEST_METHOD": "GET", "PATH_INFO": query}
        try:
            middleware(environ, start_response)
        except gevent.Timeout:
            wait_until_idle(engine.url)  # then the answer is there, for whoever asks next
    return answers[0]


def wait_until_idle(url: URL) -> None:
    busy = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND state = 'active' AND pid <> pg_backend_pid()"
    )
    engine = create_engine(url, poolclass=NullPool)
    with gevent.Timeout(10), engine.connect() as connection:
        while connection.scalar(busy):
            connection.rollback()
            gevent.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("seed", type=int)
    parser.add_argument("--plain-rollback", action="store_true")
    parser.add_argument("--once", action="store_true")
    options = parser.parse_args()
    # It tells of each commit that is hit, as it should.
    logging.getLogger("wsgi_dbsession").propagate = False
    logging.getLogger("wsgi_dbsession").addHandler(logging.NullHandler())
    if options.plain_rollback:
        SQLAlchemySession.invalidate = SQLAlchemySession.rollback  # type: ignore[method-assign]
    if options.once:
        engine = make_engine(options.url, pool_size=1)
        print(json.dumps(interrupt_once(engine)), flush=True)
        return
    engine = make_engine(options.url, pool_size=4)
    load = Load(engine, options.seed)
    with gevent.Timeout(60):
        load.run()
    gc.collect()
    pool: Any = engine.pool
    result = {
        "told": load.told,
        "unfinished": sorted(load.unfinished),
        "wrong": load.wrong,
        "ended": load.ended,
        "checked out": pool.checkedout(),
        "sessions": len(load.session.registry.registry),
        "scope": [
            repr(value)
            for variable, value in contextvars.copy_context().items()
            if variable.name == "wsgi_dbsession.scope" and value is not None
        ],
    }
    print(json.dumps(result), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
