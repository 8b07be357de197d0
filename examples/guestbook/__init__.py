"""The guestbook of ``make demo``: begin with ``app.py``."""

from .app import Session, create_app
from .database import Entry

__all__ = ["Entry", "Session", "create_app"]
