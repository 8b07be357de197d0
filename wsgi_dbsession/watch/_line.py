"""The line of the application that asks for a connection, found at little cost.

Each request pays for it, so files are sorted once and frames are only looked up.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import sqlalchemy

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType, FrameType
    from typing import TypeAlias

Line: TypeAlias = "tuple[CodeType, int]"
"""A function and an instruction: to look for the number costs more than the rest."""

# What a file belongs to.
APPLICATION, LIBRARY, SQLALCHEMY, PYTHON, OURS = range(5)

# A look at an attribute of sys would be paid for by each request, too.
_get_frame: Callable[[int], FrameType] = cast("Any", sys)._getframe

_SQLALCHEMY = str(Path(sqlalchemy.__file__).parent)
_OURS = str(Path(__file__).parents[1])
_PYTHON = ("<", *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib")))
_PACKAGES = tuple(sysconfig.get_path(name) for name in ("purelib", "platlib"))


_MOST = 1000


class LineFinder:
    """Finds the line of the application that led to a call.

    It is asked for each connection, and to look at a frame costs a thousand instructions. So it
    looks first where it found the application the last time, and accepts a line there if it was
    seen to call SQLAlchemy directly.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._kinds: dict[str, int] = {}
        # By the id of its function, which it keeps: a function itself is slow to look up.
        self._direct: dict[tuple[int, int], Line] = {}

    def find(self) -> Line | None:
        """Return the line of the application that led to the caller."""
        try:
            frame = _get_frame(self._depth)
            return self._direct[id(frame.f_code), frame.f_lasti]
        except (KeyError, ValueError):  # not seen before; not so deep
            pass
        line, steps = self.search(_get_frame(1))
        self._depth = steps + 1
        if line is not None and len(self._direct) < _MOST:
            kinds = self._kinds
            inside = kinds.get(_get_frame(steps).f_code.co_filename)
            if kinds[line[0].co_filename] == APPLICATION and inside == SQLALCHEMY:
                self._direct[id(line[0]), line[1]] = line
        return line

    def search(self, frame: FrameType | None) -> tuple[Line | None, int]:
        """Return the innermost line of the application, at or outside of a frame.

        An application that is installed like a library has none: then it is the innermost line
        inside of the middleware that belongs neither to SQLAlchemy nor to Python.

        :return: the line, None if there is only Python, SQLAlchemy and this package; and how many
            frames were passed over.
        """
        library: Line | None = None
        steps = 0
        while frame is not None:
            code = frame.f_code
            kind = self._kinds.get(code.co_filename)
            if kind is None:
                kind = self._kinds[code.co_filename] = kind_of(code.co_filename)
            if kind == APPLICATION:
                return (code, frame.f_lasti), steps
            if library is None:
                if kind == LIBRARY:
                    library = code, frame.f_lasti
            elif kind == OURS:
                # Outside of the middleware is the server, which may be started by a script.
                break
            steps += 1
            frame = frame.f_back
        return library, steps


def kind_of(filename: str) -> int:
    """Return what a file belongs to."""
    if filename.startswith(_OURS):
        return OURS
    if filename.startswith(_SQLALCHEMY):
        return SQLALCHEMY
    if filename.startswith(_PACKAGES) or "-packages" in filename:
        return LIBRARY
    return PYTHON if filename.startswith(_PYTHON) else APPLICATION


def show_line(line: Line | None) -> str:
    """Return a line in the words of a traceback."""
    if line is None:
        return "an unknown line"
    code, instruction = line
    lines = (number for start, end, number in code.co_lines() if start <= instruction < end)
    return f"{code.co_filename}:{next(lines, None) or code.co_firstlineno} in {code.co_name}"
