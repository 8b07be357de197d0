"""The thread or greenlet that runs: how to know it again, its name, and where it is."""

from __future__ import annotations

import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import TypeAlias

# Weak: a greenlet that is never resumed must be collected, and its connection returned.
Here: TypeAlias = "int | weakref.ref[Any]"


def find_here() -> Callable[[], Here]:
    """Return what tells threads apart, or greenlets where gevent has put them in their place."""
    monkey: Any = sys.modules.get("gevent.monkey")
    if monkey is None or not monkey.is_module_patched("threading"):
        return threading.get_ident
    getcurrent = sys.modules["greenlet"].getcurrent
    return lambda: weakref.ref(getcurrent())


def thread_names() -> dict[int | None, str]:
    """Return the names of the threads."""
    return {thread.ident: thread.name for thread in threading.enumerate()}


def name_of(here: Here, names: dict[int | None, str]) -> str:
    """Return the name of a thread or greenlet."""
    if isinstance(here, int):
        return names.get(here, f"thread {here}")
    greenlet: Any = here()
    if greenlet is None:
        return "a greenlet that is gone"
    return f"greenlet {getattr(greenlet, 'name', None) or hex(id(greenlet))}"


def thread_frames() -> dict[int, FrameType]:
    """Return the innermost frame of each thread, where they can be looked at."""
    # Without a lock around the interpreter, frames change while another thread reads them.
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return {}
    found: dict[int, FrameType] = cast("Any", sys)._current_frames()
    return found


def frame_of(here: Here, frames: dict[int, FrameType]) -> FrameType | None:
    """Return the innermost frame of a thread or greenlet, None if it cannot be known."""
    if isinstance(here, int):
        return frames.get(here)
    frame: FrameType | None = getattr(here(), "gr_frame", None)
    return frame
