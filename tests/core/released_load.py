"""Fifty requests wait for a slow service at the same time, over a pool of one connection.

``python -m gevent.monkey --module tests.core.released_load URL`` runs it with greenlets, for which
gevent replaces the threads, and prints what came of it. With ``--hold`` each request keeps its
connection while it waits.
"""

from __future__ import annotations

import argparse
import json
import threading
from collections import Counter
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import scoped_session, sessionmaker

from tests.support.models import Note, make_engine
from tests.support.wsgi import ask
from wsgi_dbsession import SessionMiddleware, current_scope

if TYPE_CHECKING:
    from collections.abc import Iterable

    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from sqlalchemy import URL

REQUESTS = 50
TIMEOUT = 60  # seconds after which it has failed, not how long anything takes


class Load:
    """Requests that read, wait in the service, and write; on note 1 each.

    :param hold: whether they keep their connections while they wait.
    """

    def __init__(self, url: URL | str, *, hold: bool) -> None:
        timeout = 0.5 if hold else TIMEOUT
        self.engine = make_engine(url, pool_size=1, pool_timeout=timeout)
        self.session = scoped_session(sessionmaker(self.engine), scopefunc=current_scope)
        self.app = SessionMiddleware(self.application, self.session)
        self.hold = hold
        self.waiting = self.gone = 0
        self.changed = threading.Condition()

    def application(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        note = self.session.get(Note, 1)
        assert note is not None
        before = note.text
        with nullcontext() if self.hold else current_scope().released():
            waiting = self.service()
            assert note.text == before
        self.session.add(Note(text=f"after {note.id}"))
        start_response("200 OK", [])
        return [str(waiting).encode()]

    def service(self) -> int:
        """Be slow: answer when each of the requests waits, or is over.

        :return: how many have waited at the same time.
        """
        with self.changed:
            self.waiting += 1
            self.changed.notify_all()
            answered = self.changed.wait_for(lambda: self.waiting + self.gone >= REQUESTS, TIMEOUT)
            assert answered, f"{self.waiting} waiting, {self.gone} gone"
            return self.waiting

    def request(self, results: Counter[str]) -> None:
        reply = ask(self.app)
        with self.changed:
            errors = [type(error).__name__ for error in reply.errors]
            if any(isinstance(error, PoolTimeout) for error in reply.errors):
                errors = ["pool timed out"]
            results.update(errors or [f"{reply.body.decode()} waited at once"])
            self.gone += bool(errors)
            self.changed.notify_all()

    def run(self) -> dict[str, int]:
        """Send the requests all at once, and return how many ended how."""
        results: Counter[str] = Counter()
        threads = [threading.Thread(target=self.request, args=[results]) for _ in range(REQUESTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT)
        assert not any(thread.is_alive() for thread in threads)
        pool: Any = self.engine.pool
        assert pool.checkedout() == 0
        self.engine.dispose()
        return dict(results)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("--hold", action="store_true")
    options = parser.parse_args()
    print(json.dumps(Load(options.url, hold=options.hold).run()))


if __name__ == "__main__":
    main()
