"""SQLAlchemy sessions done right for WSGI: one per request, ended with its response."""

from ._middleware import SessionMiddleware, default_commit_veto
from ._scope import NoScopeError, Scope, current_scope, session_scope
from ._version import __version__

__all__ = [
    "NoScopeError",
    "Scope",
    "SessionMiddleware",
    "__version__",
    "current_scope",
    "default_commit_veto",
    "session_scope",
]
