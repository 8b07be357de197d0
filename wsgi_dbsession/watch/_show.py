"""Describe the current holders of an account, and who waits for a connection."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from time import monotonic
from typing import TYPE_CHECKING

from sqlalchemy.engine.cursor import CursorFetchStrategy

from wsgi_dbsession._response import Response

from ._line import SQLALCHEMY, LineFinder, kind_of, show_line
from ._records import Holder, Waiter
from ._threads import frame_of, name_of, thread_frames, thread_names

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from ._holder import Hold
    from ._records import State

_ENDS = frozenset({"do_commit", "do_rollback", "do_prepare_twophase", "do_commit_twophase"})
_FETCHES = frozenset({"fetchone", "fetchmany", "fetchall"})
# A Result has methods with the same names, which run application code too.
_FETCHING = CursorFetchStrategy.fetchone.__code__.co_filename
_finder = LineFinder()


def show_holders(
    holds: dict[int, Hold], backends: dict[int, int | None], warn_after: float | None
) -> list[Holder]:
    """Return who holds a connection right now, the longest first."""
    now, names, frames = monotonic(), thread_names(), thread_frames()
    return [
        Holder(
            **hold.names()._asdict(),
            state=state_of(hold, now, warn_after, frames),
            since=_ago(now - hold.since),
            held_s=now - hold.since,
            idle_s=idle(hold, now, frames),
            idle_share=hold.idle_share(now),
            statements=hold.statements,
            wrote=hold.wrote,
            backend_pid=backends.get(key),
            thread=name_of(hold.ident, names),
            line=show_line(hold.line),
            now=where(hold, frames),
            pool=hold.pool.name,
        )
        for key, hold in sorted(holds.copy().items(), key=lambda item: item[1].since)
    ]


def show_waiting(waiting: set[Hold]) -> list[Waiter]:
    """Return who waits for a connection right now, the longest first."""
    now, names = monotonic(), thread_names()
    return [
        Waiter(
            **hold.names()._asdict(),
            since=_ago(now - hold.asked),
            waited_s=now - hold.asked,
            thread=name_of(hold.ident, names),
            line=show_line(hold.line),
            pool=hold.pool.name,
        )
        for hold in sorted(waiting.copy(), key=lambda hold: hold.asked)
    ]


def where(hold: Hold, frames: dict[int, FrameType]) -> str | None:
    """Return where the thread or greenlet of a holder is now, if that is known."""
    if hold.is_left_over():
        return None
    if hold.is_between_steps():
        # Its thread may be serving another request.
        return "between two blocks of the response"
    line, _ = _finder.search(frame_of(hold.ident, frames))
    return None if line is None else f"at {show_line(line)}"


def describe(hold: Hold, now: float, frames: dict[int, FrameType]) -> str:
    """Return a holder in words, for an error or a log line."""
    name, line = hold.names().name, where(hold, frames)
    return (
        f"{name}, held for {now - hold.since:.1f} s, idle for {idle(hold, now, frames):.1f} s, "
        f"asked at {show_line(hold.line)}{f', now {line}' if line else ''}"
    )


def is_stream(hold: Hold, frames: dict[int, FrameType]) -> bool:
    """Return whether the holder is a response whose body is being iterated over."""
    if hold.is_left_over():
        return False
    return hold.is_between_steps() or any(
        frame.f_code is Response.__iter__.__code__ for frame in _stack(hold, frames)
    )


def state_of(
    hold: Hold, now: float, warn_after: float | None, frames: dict[int, FrameType]
) -> State:
    """Return the state of a holder."""
    if hold.is_left_over():
        return "left over"
    if is_running(hold, frames):
        return "running"
    return "idle" if warn_after is None or now - hold.last <= warn_after else "overdue"


def is_running(hold: Hold, frames: dict[int, FrameType]) -> bool:
    """Return whether the database works for a holder: on a statement, a fetch, or its end."""
    if hold.began:
        return True
    if hold.is_left_over() or hold.is_between_steps():
        # Its thread may be serving another request.
        return False
    # The stack shows it, because to record fetches and COMMITs would slow down each request.
    for frame in _stack(hold, frames):
        code = frame.f_code
        if code.co_name in _FETCHES and code.co_filename == _FETCHING:
            return True
        if code.co_name in _ENDS and kind_of(code.co_filename) == SQLALCHEMY:
            return True
    return False


def idle(hold: Hold, now: float, frames: dict[int, FrameType]) -> float:
    """Return for how many seconds the database has not worked for a holder."""
    return 0.0 if is_running(hold, frames) else now - hold.last


def _stack(hold: Hold, frames: dict[int, FrameType]) -> Iterator[FrameType]:
    frame = frame_of(hold.ident, frames)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _ago(seconds: float) -> datetime:
    return datetime.now(timezone.utc) - timedelta(seconds=seconds)
