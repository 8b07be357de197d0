"""Replica: reads in one round trip, and from replicas that have what their client has written.

:func:`read_only_engine` makes an engine on which the server refuses writes, :func:`session_class`
lets the requests that only read use it, and :class:`Replicas` lets them use replicas.
"""

from ._read_only import is_refused_write, read_only_engine
from ._replicas import Replicas
from ._routing import has_safe_method, session_class

__all__ = [
    "Replicas",
    "has_safe_method",
    "is_refused_write",
    "read_only_engine",
    "session_class",
]
