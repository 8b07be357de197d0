"""For tests: isolation that leaves no rows, and a record of the outcome of each scope."""

from wsgi_dbsession.testing._isolation import isolate
from wsgi_dbsession.testing._outcomes import Recorded, record_outcomes

__all__ = ["Recorded", "isolate", "record_outcomes"]
