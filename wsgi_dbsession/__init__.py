"""SQLAlchemy sessions done right for WSGI."""
