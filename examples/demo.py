"""Serves the guestbook with gevent, shows in plain words what becomes of requests, and stays.

``--once`` ends after the show instead: with 0 if everything was as told, else with 1.
``PORT`` chooses the port, ``DATABASE_URL`` another database than a temporary SQLite file.
"""

from gevent import monkey

monkey.patch_all()  # before anything else is imported

import argparse
import http.client
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlencode

from gevent.pywsgi import WSGIServer
from guestbook import Entry, Session, create_app
from sqlalchemy import Engine, create_engine, func, select
from sqlalchemy.exc import SQLAlchemyError


class Show:
    """Requests over real HTTP, and a look at the database through a connection of its own."""

    def __init__(self, port: int, url: str, engine: Engine) -> None:
        self.port = port
        self.engine = engine
        self.observer = create_engine(url)
        self.as_told = True

    def request(self, path: str, form: dict[str, str] | None = None) -> tuple[int, str]:
        """Send a POST; return the status and the body, or what came of it."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        connection.request("POST", path, urlencode(form or {}), headers)
        response = connection.getresponse()
        body = response.read().decode()
        connection.close()
        return response.status, body

    def leave_a_stream(self) -> str:
        """Send a POST, read the first line of the answer and hang up."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request("POST", "/stream")
        response = connection.getresponse()
        line = response.readline().decode().strip()
        response.close()
        connection.close()
        return line

    def entries(self) -> int:
        """Count the entries that are committed."""
        with self.observer.connect() as connection:
            return connection.scalar(select(func.count()).select_from(Entry)) or 0

    def wait_until_idle(self) -> bool:
        """Wait until every connection is back in the pool, ten seconds at most."""
        end = time.monotonic() + 10
        while self.engine.pool.checkedout() and time.monotonic() < end:  # type: ignore[attr-defined]
            time.sleep(0.05)
        return self.engine.pool.checkedout() == 0  # type: ignore[attr-defined,no-any-return]

    def tell(self, what: str, seen: str, *, as_told: bool) -> None:
        """Print what was done and what came of it."""
        self.as_told = self.as_told and as_told
        print(f"\n{what}\n  {seen}\n  {'as told' if as_told else 'NOT AS TOLD'}", flush=True)

    def run(self) -> bool:
        """Show every case; return whether all was as told."""
        before = self.entries()

        status, _ = self.request("/sign", {"name": "Ada", "text": "Hello!"})
        now = self.entries()
        self.tell(
            "A commit: a guest signs, and is sent back to the page (303).",
            f"The client got {status}; by then {now - before} new entry was in the database.",
            as_told=status == 303 and now == before + 1,
        )

        before = now
        status, _ = self.request("/crash")
        now = self.entries()
        self.tell(
            "A rollback: the view writes an entry, then it has a bug.",
            f"The client got {status}; {now - before} new entries are in the database.",
            as_told=status == 500 and now == before,
        )

        status, body = self.request("/stranger")
        now = self.entries()
        self.tell(
            "A failed commit: the view returned 200, but the database refuses the COMMIT.",
            f"The client got {status}: {body.strip()!r}; {now - before} new entries.",
            as_told=status == 500 and now == before,
        )

        status, body = self.request("/stream")
        now = self.entries()
        self.tell(
            "A stream: five lines, written while they are sent, in one transaction.",
            f"The client got {status}, {body.count('written')} lines; {now - before} new entries.",
            as_told=status == 200 and body.count("written") == 5 and now == before + 5,
        )

        before = now
        line = self.leave_a_stream()
        idle = self.wait_until_idle()
        now = self.entries()
        back = "are back in the pool" if idle else "are NOT back in the pool"
        self.tell(
            "A client that goes away after the first line of such a stream.",
            f"It had read {line!r}; {now - before} new entries, and all connections {back}.",
            as_told=line == "line 1 is written" and idle and now == before,
        )
        self.observer.dispose()
        return self.as_told


def main() -> int:
    """Run the show, and serve on unless told otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--once", action="store_true", help="end after the show")
    options = parser.parse_args()
    # The errors of the show are on purpose; their tracebacks would bury what it says.
    for name in ("guestbook", "wsgi_dbsession"):
        logging.getLogger(name).setLevel(logging.CRITICAL)

    with tempfile.TemporaryDirectory() as directory:
        url = os.environ.get("DATABASE_URL") or f"sqlite:///{Path(directory) / 'guestbook.db'}"
        try:
            app = create_app(url)
        except (ImportError, SQLAlchemyError) as error:
            print(f"Cannot use the database of DATABASE_URL: {error}", file=sys.stderr)
            return 1
        engine: Engine = Session.session_factory.kw["bind"]
        server = WSGIServer(("127.0.0.1", int(os.environ.get("PORT", "0"))), app, log=None)
        try:
            server.start()
        except OSError as error:
            print(f"Cannot listen on port {os.environ.get('PORT')}: {error}", file=sys.stderr)
            return 1
        try:
            print(f"The guestbook is in {engine.url.render_as_string()}.")
            port = int(server.address[1])
            if not Show(port, url, engine).run():
                print("\nSomething was not as told: please report it.", file=sys.stderr)
                return 1
            if not options.once:
                print(f"\nNow try it yourself: http://127.0.0.1:{port}/")
                print("Ctrl-C ends it.", flush=True)
                server.serve_forever()
        except KeyboardInterrupt:
            print("\nGoodbye.")
        finally:
            server.stop()
            engine.dispose()
    return 0


if __name__ == "__main__":
    sys.exit(main())
