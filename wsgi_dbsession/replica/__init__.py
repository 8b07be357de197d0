"""Replica: reads in one round trip, and from replicas that have their client's writes.

:func:`read_only_engine` makes an engine on which the server refuses writes.
:func:`session_class` routes requests that only read to it, and :class:`Replicas` routes them to
replicas.
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
