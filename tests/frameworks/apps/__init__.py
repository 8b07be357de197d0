"""The same application in every framework, each in the way of that framework's users.

Each module has one entry point, ``make_app(**options)``, whose options are those of
:class:`~wsgi_dbsession.SessionMiddleware`. What its pages do:

===== ================== =========================================================================
GET   /notes             shows the notes, one a line
POST  /notes             adds the note ``text`` and redirects to /notes
POST  /books             adds a book whose author does not exist: the commit fails
POST  /raise             adds a note and raises what no handler knows
POST  /refuse            adds a note and raises `RefusedError`: the error handler answers 409
POST  /apologise         adds a note and raises `ApologyError`: the error handler answers 200
POST  /abort             adds a note and ends with 403, in the framework's own way
POST  /stream/<ending>   adds notes while it streams, see `stream`
POST  /download/<ending> adds a note and sends a file; <ending> "book" makes the commit fail
POST  /mounted/<ending>  another WSGI application, see `tests.frameworks.apps.mounted`
===== ================== =========================================================================
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication


class Framework(NamedTuple):
    """A framework, its distribution on PyPI, and the module of its application."""

    name: str
    distribution: str | None
    module: str

    def make_app(self, **options: Any) -> WSGIApplication:
        """Make the application; the framework is imported only now."""
        module = importlib.import_module(f"{__name__}.{self.module}")
        app: WSGIApplication = module.make_app(**options)
        return app


FRAMEWORKS = (
    Framework("Flask", "flask", "flask_app"),
    Framework("Bottle", "bottle", "bottle_app"),
    Framework("Falcon", "falcon", "falcon_app"),
    Framework("Pyramid", "pyramid", "pyramid_app"),
    Framework("CherryPy", "cherrypy", "cherrypy_app"),
    Framework("Django", "django", "django_app"),
    Framework("Werkzeug", "werkzeug", "werkzeug_app"),
    Framework("bare WSGI", None, "bare_app"),
)
