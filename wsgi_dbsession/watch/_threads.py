"""Threads and greenlets: their identity, their names and their frames."""

from __future__ import annotations

import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import TypeAlias

# A weak reference, so that a greenlet that is never resumed is collected and its connection
# returned.
Ident: TypeAlias = "int | weakref.ref[Any]"


def find_get_ident() -> Callable[[], Ident]:
    """Return a function that identifies the current thread, or greenlet under gevent."""
    monkey: Any = sys.modules.get("gevent.monkey")
    if monkey is None or not monkey.is_module_patched("threading"):
        return threading.get_ident
    getcurrent = sys.modules["greenlet"].getcurrent
    return lambda: weakref.ref(getcurrent())


def thread_names() -> dict[int | None, str]:
    """Return the names of the threads."""
    return {thread.ident: thread.name for thread in threading.enumerate()}


def name_of(ident: Ident, names: dict[int | None, str]) -> str:
    """Return the name of a thread or greenlet."""
    if isinstance(ident, int):
        return names.get(ident, f"thread {ident}")
    greenlet: Any = ident()
    if greenlet is None:
        return "a greenlet that is gone"
    return f"greenlet {getattr(greenlet, 'name', None) or hex(id(greenlet))}"


def thread_frames() -> dict[int, FrameType]:
    """Return the innermost frame of each thread, or nothing if that is unsafe."""
    # Without the GIL, a frame may change while another thread reads it.
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return {}
    found: dict[int, FrameType] = cast("Any", sys)._current_frames()
    return found


def frame_of(ident: Ident, frames: dict[int, FrameType]) -> FrameType | None:
    """Return the innermost frame of a thread or greenlet, None if it is unknown."""
    if isinstance(ident, int):
        return frames.get(ident)
    frame: FrameType | None = getattr(ident(), "gr_frame", None)
    return frame
