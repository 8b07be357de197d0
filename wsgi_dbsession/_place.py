"""The line of the application that led to something, for a log line or an error."""

from __future__ import annotations

import inspect
import sysconfig
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy

if TYPE_CHECKING:
    from types import FrameType

_OURS = (
    str(Path(__file__).parent),
    str(Path(sqlalchemy.__file__).parent),
    "<",  # generated code
)
_LIBRARIES = (
    *_OURS,
    *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
)


def calling_line() -> str:
    """Return the line that called SQLAlchemy or this package, in whatever library it stands."""
    return _find(_OURS, libraries=True)


def application_line() -> str:
    """Return the innermost line that belongs to no installed library."""
    return _find(_LIBRARIES, libraries=False)


def _find(skipped: tuple[str, ...], *, libraries: bool) -> str:
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(skipped) and (libraries or "-packages" not in name):
            return f"{name}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return f"{threading.current_thread().name}, in a library"
