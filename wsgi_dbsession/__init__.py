"""A WSGI middleware that gives each request its own SQLAlchemy Session and always closes it."""

from ._block import session_scope
from ._middleware import SessionMiddleware, default_commit_veto
from ._registry import observe
from ._scope import NoScopeError, Observer, Scope, current_scope, find_scope
from ._version import __version__

__all__ = [
    "NoScopeError",
    "Observer",
    "Scope",
    "SessionMiddleware",
    "__version__",
    "current_scope",
    "default_commit_veto",
    "find_scope",
    "observe",
    "session_scope",
]
