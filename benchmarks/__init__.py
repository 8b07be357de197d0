"""Measures wsgi_dbsession against what one would use instead: ``make bench``."""
