"""The line of the application that led to something, for a log line or an error."""

from __future__ import annotations

import inspect
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

_LAYERS = (
    str(Path(__file__).parent),
    str(Path(sqlalchemy.__file__).parent),
    "<",  # generated code
)


def calling_line() -> str:
    """Return the line that called SQLAlchemy or this package, even if a library contains it."""
    return innermost_line(is_layer)


def is_layer(file: str) -> bool:
    """Return whether a file is of SQLAlchemy or of this package."""
    return file.startswith(_LAYERS)


def innermost_line(is_skipped: Callable[[str], bool]) -> str:
    """Return the innermost line of this thread, apart from those in files that are skipped."""
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        name = frame.f_code.co_filename
        if not is_skipped(name):
            return f"{name}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return f"{threading.current_thread().name}, in a library"
