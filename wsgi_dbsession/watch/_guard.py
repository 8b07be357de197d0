"""The warning about a connection that is held and not used."""

from __future__ import annotations

import threading
import time
from os import getpid
from typing import TYPE_CHECKING

from wsgi_dbsession._report import log

from ._line import Line, show_line
from ._show import is_stream, state_of, where
from ._threads import thread_frames

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from ._holder import Hold

# The thread ends after so many rounds without a holder. The next checkout starts another one.
_IDLE_ROUNDS = 20


class Guard:
    """Checks the holders periodically, in a thread that ends when there are none.

    Under gevent the thread is a greenlet. A child of a fork starts its own.

    :param warn_after: how many seconds without a statement are too long.
    :param holds: returns the holders.
    """

    def __init__(self, warn_after: float, holds: Callable[[], list[Hold]]) -> None:
        self.warn_after = warn_after
        self._holds = holds
        self._period = min(max(warn_after / 4, 0.01), 1.0)
        self._warned: set[tuple[str, Line | None]] = set()
        self.pid = 0  # of the process in which the thread runs; 0 if none does
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start the thread, unless this process has one."""
        with self._lock:
            if self.pid != getpid():
                self.pid = getpid()
                name = "wsgi_dbsession.watch"
                threading.Thread(target=self._run, name=name, daemon=True).start()

    def reset(self) -> None:
        """Reset the state in a child process: a thread of the parent may have held the lock."""
        self.pid = 0
        self._lock = threading.Lock()

    def _run(self) -> None:
        rounds = 0
        while rounds < _IDLE_ROUNDS:
            time.sleep(self._period)
            holds = self._holds()
            rounds = 0 if holds else rounds + 1
            now = time.monotonic()
            long = [hold for hold in holds if now - hold.since > self.warn_after]
            if long:
                self._check(long, now, thread_frames())
        self.pid = 0
        # A checkout before that line has found a thread, and has not started one.
        if self._holds():
            self.start()

    def _check(self, holds: list[Hold], now: float, frames: dict[int, FrameType]) -> None:
        for hold in holds:
            if is_stream(hold, frames):
                how = "by a stream"
                fix = 'use commit_on="auto", and `with session_scope(Session):` for each block'
                self._warn(hold, frames, how, now - hold.since, fix)
                continue
            state = state_of(hold, now, self.warn_after, frames)
            if state == "left over":
                how = "after the end of its scope"
                fix = "close the Session or Connection that asked for it"
                self._warn(hold, frames, how, now - hold.since, fix)
            elif state == "overdue":
                how = "without a statement"
                fix = "use `with current_scope().released():` around the slow call"
                self._warn(hold, frames, how, now - hold.last, fix)
            elif state == "running":
                hold.last = now  # nothing else records the time of a fetch or a COMMIT

    def _warn(
        self, hold: Hold, frames: dict[int, FrameType], how: str, seconds: float, fix: str
    ) -> None:
        place = (how, hold.line)
        if place in self._warned:
            return
        self._warned.add(place)
        name, line, now = hold.names().name, show_line(hold.line), where(hold, frames)
        log.warning(
            "connection held %s for %.1f s: %s, first asked for at %s%s. Release it: %s",
            how,
            seconds,
            name,
            line,
            f", now {now}" if now else "",
            fix,
            extra={"scope": name, "line": line, "seconds": seconds},
        )
