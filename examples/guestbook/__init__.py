"""The guestbook of ``make demo``: begin with ``app.py``."""

from .app import Entry, Session, create_app

__all__ = ["Entry", "Session", "create_app"]
