"""Where something was opened, in the words of a traceback."""

from __future__ import annotations

import inspect
import sysconfig
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

_LIBRARIES = (
    sysconfig.get_path("stdlib"),
    sysconfig.get_path("purelib"),
    sysconfig.get_path("platlib"),
    str(Path(__file__).parents[1]),
    "<",  # generated code
)


def place() -> str:
    """Return the line of the innermost caller who is neither this package nor a library."""
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        code = frame.f_code
        if not code.co_filename.startswith(_LIBRARIES) and "-packages" not in code.co_filename:
            return f"{code.co_filename}:{frame.f_lineno} in {code.co_name}"
        frame = frame.f_back
    return f"{threading.current_thread().name}, in a library"
