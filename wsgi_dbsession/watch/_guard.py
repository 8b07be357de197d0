"""The warning about a connection that is held and not used."""

from __future__ import annotations

import threading
import time
from os import getpid
from typing import TYPE_CHECKING

from wsgi_dbsession._report import log

from ._here import thread_frames
from ._line import show_line
from ._show import is_stream, state_of, where

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from ._holder import Hold
from ._line import Line

# A thread that found nothing to look at so many times ends; the next connection starts another.
_IDLE_ROUNDS = 20


class Guard:
    """Looks at the holders every now and then, in a thread that ends when there are none.

    Under gevent it is a greenlet. A child of a fork starts one of its own.

    :param warn_after: how many seconds without a statement are too long.
    :param holds: returns the holders.
    """

    def __init__(self, warn_after: float, holds: Callable[[], list[Hold]]) -> None:
        self.warn_after = warn_after
        self._holds = holds
        self._period = min(max(warn_after / 4, 0.01), 1.0)
        self._warned: set[tuple[str, Line | None]] = set()
        self.pid = 0  # of the process whose thread looks on
        self._lock = threading.Lock()

    def wake(self) -> None:
        """Look on from now on, if no thread of this process does."""
        with self._lock:
            if self.pid != getpid():
                self.pid = getpid()
                name = "wsgi_dbsession.watch"
                threading.Thread(target=self._run, name=name, daemon=True).start()

    def renew(self) -> None:
        """Be that of a new process, whatever the parent's threads were about to do."""
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
                self._look(long, now, thread_frames())
        self.pid = 0
        # Somebody may have got a connection before that line, and found a thread.
        if self._holds():
            self.wake()

    def _look(self, holds: list[Hold], now: float, frames: dict[int, FrameType]) -> None:
        for hold in holds:
            if is_stream(hold, frames):
                how = "by a stream"
                fix = 'commit_on="auto", and `with session_scope(Session):` for each block'
                self._warn(hold, frames, how, now - hold.since, fix)
                continue
            state = state_of(hold, now, self.warn_after, frames)
            if state == "left over":
                how = "after the end of its scope"
                self._warn(hold, frames, how, now - hold.since, "close() what asked for it")
            elif state == "overdue":
                how = "without a statement"
                fix = "`with current_scope().released():` around the slow call"
                self._warn(hold, frames, how, now - hold.last, fix)
            elif state == "running":
                hold.last = now  # a fetch or a COMMIT does not account for itself

    def _warn(
        self, hold: Hold, frames: dict[int, FrameType], how: str, seconds: float, fix: str
    ) -> None:
        place = (how, hold.line)
        if place in self._warned:
            return
        self._warned.add(place)
        name, line, now = hold.names().name, show_line(hold.line), where(hold, frames)
        log.warning(
            "connection held %s for %.1f s: %s, first asked for at %s%s. Give it back: %s",
            how,
            seconds,
            name,
            line,
            f", now {now}" if now else "",
            fix,
            extra={"scope": name, "line": line, "seconds": seconds},
        )
