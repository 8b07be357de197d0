"""Holders that are greenlets: ``python -m gevent.monkey --module tests.watch.gevent_holders URL``.

It writes as JSON what the watch, and its guard, have seen of them.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
from dataclasses import asdict
from typing import Any

import gevent
from gevent.event import Event
from sqlalchemy import QueuePool, create_engine, text

from tests.support.wsgi import make_registry
from wsgi_dbsession import session_scope
from wsgi_dbsession.watch import Watch


class Messages(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.arrived = Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())
        self.arrived.set()


def main(url: str) -> None:
    engine = create_engine(url, poolclass=QueuePool, pool_size=2, max_overflow=0)
    registry = make_registry(engine)
    watch = Watch(registry, warn_after=0.05)
    messages = Messages()
    logging.getLogger("wsgi_dbsession").addHandler(messages)

    def hold(name: str) -> None:
        with session_scope(registry, name=name):
            registry.execute(text("SELECT 1"))
            messages.arrived.wait(60)

    greenlets = [gevent.spawn(hold, name) for name in ("one", "two")]
    while len(watch.holders()) < 2:
        gevent.sleep(0.01)
    holders = [asdict(holder) for holder in watch.holders()]
    gevent.joinall(greenlets, timeout=60)

    kept: list[Any] = []
    gone = gevent.spawn(lambda: kept.append(engine.connect()))
    gone.join()
    del gone
    gevent.sleep(0)
    gc.collect()
    (left,) = watch.holders()
    kept.pop().close()
    found = {
        "holders": holders,
        "messages": messages.found,
        "ended": [ended.name for ended in watch.ended()],
        "left": [left.thread, left.now],
    }
    print(json.dumps(found, default=str))


if __name__ == "__main__":
    main(sys.argv[1])
