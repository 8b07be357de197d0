"""Find the line of the application that asks for a connection, at little cost.

It runs in each request, so files are classified once, and known frames are only looked up.
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
"""A code object and an instruction: finding the line number costs more than the rest."""

# The kinds of files.
APPLICATION, LIBRARY, SQLALCHEMY, PYTHON, OURS = range(5)

# A global name, because the attribute lookup would slow down each request.
_get_frame: Callable[[int], FrameType] = cast("Any", sys)._getframe

_SQLALCHEMY = str(Path(sqlalchemy.__file__).parent)
_OURS = str(Path(__file__).parents[1])
_PYTHON = ("<", *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib")))
_PACKAGES = tuple(sysconfig.get_path(name) for name in ("purelib", "platlib"))


_MOST = 1000


class LineFinder:
    """Finds the line of the application that led to a call.

    It runs for each checkout, and looking at a frame costs a thousand instructions. So it first
    tries the depth of the last result, and accepts a line that is known to call SQLAlchemy
    directly.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._kinds: dict[str, int] = {}
        # By the id of the code object, which is slow to hash. The line keeps it alive.
        self._direct: dict[tuple[int, int], Line] = {}

    def find(self) -> Line | None:
        """Return the line of the application that led to the caller."""
        try:
            frame = _get_frame(self._depth)
            return self._direct[id(frame.f_code), frame.f_lasti]
        except (KeyError, ValueError):  # an unknown line; a stack that is not so deep
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

        An application that is installed like a library has no such line. Then it is the innermost
        line of a library inside of the middleware.

        :return: the line, or None if it was not found; and how many frames were skipped.
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
                # Outside of the middleware is the server, perhaps in a script of its user.
                break
            steps += 1
            frame = frame.f_back
        return library, steps


def kind_of(filename: str) -> int:
    """Return the kind of a file."""
    if filename.startswith(_OURS):
        return OURS
    if filename.startswith(_SQLALCHEMY):
        return SQLALCHEMY
    if filename.startswith(_PACKAGES) or "-packages" in filename:
        return LIBRARY
    return PYTHON if filename.startswith(_PYTHON) else APPLICATION


def show_line(line: Line | None) -> str:
    """Return a line as text: file, number and function."""
    if line is None:
        return "an unknown line"
    code, instruction = line
    lines = (number for start, end, number in code.co_lines() if start <= instruction < end)
    return f"{code.co_filename}:{next(lines, None) or code.co_firstlineno} in {code.co_name}"
