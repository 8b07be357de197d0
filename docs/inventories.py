"""Inventories of other projects, made from what is installed.

Intersphinx finds the pages of SQLAlchemy, Flask, Werkzeug and Python by an inventory that it
fetches from their sites. To build without a network, `write` makes small ones: of the names
below, each of which must be importable, so that a misspelled one fails the build.
"""

from __future__ import annotations

import importlib
import inspect
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

URLS = {
    "flask": "https://flask.palletsprojects.com/en/stable/",
    "python": "https://docs.python.org/3/",
    "sqlalchemy": "https://docs.sqlalchemy.org/en/20/",
    "werkzeug": "https://werkzeug.palletsprojects.com/en/stable/",
}

#: project: page: the names that have their anchor there
PAGES: dict[str, dict[str, str]] = {
    "flask": {
        "api/": "flask.Flask",
    },
    "python": {
        "library/collections.abc.html": """
            collections.abc.Callable collections.abc.Iterable collections.abc.Iterator
            collections.abc.Mapping collections.abc.Sequence collections.abc.Generator
        """,
        "library/contextvars.html": "contextvars.Context contextvars.ContextVar",
        "library/contextlib.html": "contextlib.AbstractContextManager",
        "library/datetime.html": "datetime.datetime datetime.timedelta",
        "library/exceptions.html": """
            builtins.AssertionError builtins.BaseException builtins.Exception builtins.OSError
            builtins.ResourceWarning builtins.RuntimeError builtins.TypeError builtins.ValueError
        """,
        "library/functions.html": """
            builtins.bool builtins.float builtins.int builtins.object builtins.property
        """,
        "library/stdtypes.html": """
            builtins.bytes builtins.dict builtins.frozenset builtins.list builtins.str
            builtins.tuple
        """,
        "library/types.html": "types.TracebackType",
        "library/typing.html": "typing.Any typing.Literal",
    },
    "sqlalchemy": {
        "core/engines.html": "sqlalchemy.engine.URL",
        "core/metadata.html": "sqlalchemy.schema.MetaData sqlalchemy.schema.Table",
        "core/connections.html": "sqlalchemy.engine.Connection sqlalchemy.engine.Engine",
        "core/exceptions.html": """
            sqlalchemy.exc.DBAPIError sqlalchemy.exc.IntegrityError
            sqlalchemy.exc.OperationalError sqlalchemy.exc.PendingRollbackError
            sqlalchemy.exc.TimeoutError
        """,
        "orm/contextual.html": "sqlalchemy.orm.scoped_session sqlalchemy.util.ScopedRegistry",
        "orm/session_api.html": "sqlalchemy.orm.Session sqlalchemy.orm.sessionmaker",
    },
    "werkzeug": {
        "exceptions/": "werkzeug.exceptions.HTTPException",
    },
}

#: what annotations call it: its full name
SHORT_NAMES = {
    name.rpartition(".")[2]: name
    for pages in PAGES.values()
    for names in pages.values()
    for name in names.split()
} | {"sqlalchemy.orm.scoping.scoped_session": "sqlalchemy.orm.scoped_session"}
#: private classes of this package, and what a user calls them
OURS = {"wsgi_dbsession._step.Step": "Scope", "Step": "Scope"}
#: type aliases, type variables and types without a page: they stay plain text
PLAIN = frozenset(
    [
        "CommitOn",
        "F",
        "CommitVeto",
        "Headers",
        "Moment",
        "On",
        "Outcome",
        "P",
        "Reason",
        "R",
        "State",
        "WSGIApplication",
        "WSGIEnvironment",
    ]
)


def write(folder: Path) -> dict[str, tuple[str, str]]:
    """Write an inventory of each project.

    :return: by project, the address of its pages and the path of its inventory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for project, pages in PAGES.items():
        lines = [
            f"{name.removeprefix('builtins.')} py:{_role(name)} 1 {page}#$ -"
            for page, names in pages.items()
            for name in names.split()
        ]
        head = f"# Sphinx inventory version 2\n# Project: {project}\n# Version: \n"
        head += "# The remainder of this file is compressed using zlib.\n"
        path = folder / f"{project}.inv"
        path.write_bytes(head.encode() + zlib.compress("\n".join(lines).encode() + b"\n"))
        written[project] = (URLS[project], str(path))
    return written


def _role(name: str) -> str:
    module, _, attribute = name.rpartition(".")
    thing = getattr(importlib.import_module(module), attribute)
    if not inspect.isclass(thing):
        return "function" if callable(thing) else "data"
    return "exception" if issubclass(thing, BaseException) else "class"
