"""Find the current line of the test or the application, skipping libraries."""

from __future__ import annotations

import sysconfig

from wsgi_dbsession._place import innermost_line, is_layer

_LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))


def application_line() -> str:
    """Return the innermost line that is not in an installed library."""
    return innermost_line(_is_library)


def _is_library(file: str) -> bool:
    return is_layer(file) or file.startswith(_LIBRARIES) or "-packages" in file
