"""Serve the guestbook with gevent, press each of its buttons once, and stay for your browser.

``--once`` exits after the buttons: with 0 if each did what it promises, else with 1.
``PORT`` chooses the port, ``DATABASE_URL`` another database than a temporary SQLite file.
"""

from gevent import monkey

monkey.patch_all()  # before anything else is imported

import argparse
import contextlib
import http.client
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import gevent
from flask import Flask
from gevent.pywsgi import WSGIServer
from guestbook import Entry, Session, create_app
from sqlalchemy import Engine, create_engine, func, select
from sqlalchemy.exc import SQLAlchemyError


class Buttons:
    """Presses the buttons over real HTTP, and counts the entries through its own connection."""

    def __init__(self, port: int, app: Flask, engine: Engine) -> None:
        self.port = port
        self.app = app
        self.engine = engine
        self.reader = create_engine(engine.url)
        self.as_promised = True

    def press(self, address: str, form: dict[str, str] | None, *, leave: bool) -> int:
        """Send a POST, and return the status; `leave` hangs up after the first line."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        connection.request("POST", address, urlencode(form or {}), headers)
        response = connection.getresponse()
        if leave:
            response.readline()
        else:
            response.read()
        response.close()
        connection.close()
        return response.status

    def entries(self) -> int:
        """Count the entries that are committed."""
        with self.reader.connect() as connection:
            return connection.scalar(select(func.count()).select_from(Entry)) or 0

    def timeline(self, address: str) -> Any:
        """Wait for the end of the last request to an address, at most ten seconds."""
        happened = self.app.jinja_env.globals["happened"]
        end = time.monotonic() + 10
        while not happened(address).closed and time.monotonic() < end:  # type: ignore[operator]
            time.sleep(0.02)
        return happened(address)  # type: ignore[operator]

    def check(
        self,
        what: str,
        address: str,
        *,
        status: int,
        new: int,
        form: dict[str, str] | None = None,
        leave: bool = False,
    ) -> None:
        """Press a button, print what happened, and compare it with what must happen.

        :param status: the status that the client must get.
        :param new: how many new entries must be in the database.
        """
        before = self.entries()
        got = self.press(address, form, leave=leave)
        timeline = self.timeline(address)
        saved = self.entries() - before
        pool: Any = self.engine.pool
        promised = (got, saved, pool.checkedout()) == (status, new, 0)
        self.as_promised = self.as_promised and promised
        print(f"\n{what}")
        for line in timeline.lines:
            print(f"  {line.actor:<11} {f'{line.text} {line.code}'.strip()}")
        print(f"  {timeline.result} New entries: {saved}.")
        print(f"  {'As promised.' if promised else 'NOT AS PROMISED.'}", flush=True)

    def press_all(self) -> bool:
        """Press every button; return whether each did what it promises."""
        check = self.check
        ada = {"name": "Ada", "text": "Hello!"}
        returned = "the view returned a 200"
        check("A commit: a guest signs.", "/sign", status=303, new=1, form=ada)
        check("A rollback: the view has a bug.", "/crash", status=500, new=0)
        check(f"A commit that fails: {returned}.", "/stranger", status=500, new=0)
        check(f"Work thrown away by mistake: {returned}.", "/discard", status=500, new=0)
        check("A stream: one transaction for five lines.", "/stream", status=200, new=5)
        check("A client that leaves.", "/stream?leave", status=200, new=0, leave=True)
        self.reader.dispose()
        return self.as_promised


def interrupt_on_signals() -> None:
    """Raise KeyboardInterrupt here on the first signal to stop, so that everything is removed."""
    main = gevent.getcurrent()
    received: list[bool] = []

    def interrupt() -> None:
        if not received:
            received.append(True)
            gevent.kill(main, KeyboardInterrupt)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            gevent.signal_handler(getattr(signal, name), interrupt)


@contextlib.contextmanager
def database() -> Iterator[str]:
    """Yield the URL of the database: that of the environment, or a file that is removed."""
    url = os.environ.get("DATABASE_URL")
    if url:
        yield url
        return
    with tempfile.TemporaryDirectory(prefix="guestbook-") as folder:
        yield f"sqlite:///{Path(folder) / 'guestbook.db'}"


def serve(url: str, *, once: bool) -> int:
    """Serve the guestbook, press its buttons, and serve on unless it is for once."""
    try:
        app = create_app(url)
    except (ImportError, SQLAlchemyError) as error:
        print(f"Cannot use the database of DATABASE_URL: {error}", file=sys.stderr)
        return 1
    engine: Engine = Session.session_factory.kw["bind"]
    server = WSGIServer(("127.0.0.1", int(os.environ.get("PORT", "0"))), app, log=None)
    try:
        try:
            server.start()
        except OSError as error:
            print(f"Cannot listen on port {os.environ.get('PORT')}: {error}", file=sys.stderr)
            return 1
        port = int(server.address[1])
        print(f"The guestbook is in {engine.url.render_as_string()}.", flush=True)
        if not Buttons(port, app, engine).press_all():
            print("\nSomething was not as promised: please report it.", file=sys.stderr)
            return 1
        if not once:
            print(f"\nNow try it yourself: http://127.0.0.1:{port}/\nCtrl-C stops it.", flush=True)
            server.serve_forever()
    finally:
        server.stop()
        engine.dispose()
    return 0


def main() -> int:
    """Read the command line, and serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--once", action="store_true", help="exit after pressing the buttons")
    options = parser.parse_args()
    # The errors of the demo are on purpose; their tracebacks would bury what it prints.
    for name in ("guestbook", "wsgi_dbsession"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    interrupt_on_signals()
    try:
        with database() as url:
            return serve(url, once=options.once)
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
