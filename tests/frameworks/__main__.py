"""Write what is seen into the tables of docs/frameworks.md: ``python -m tests.frameworks``."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.frameworks.scenarios import bound
from tests.frameworks.tables import DOCUMENT, see_all, write
from tests.support.models import Base, make_database


def main() -> None:
    """Send all requests to all applications on SQLite, and rewrite the document."""
    with tempfile.TemporaryDirectory() as directory:
        database = make_database(f"sqlite:///{Path(directory) / 'shop.db'}")
        Base.metadata.create_all(database.observer)
        with bound(database):
            tables = see_all(database)
        database.engine.dispose()
    document = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(write(document, tables), encoding="utf-8")


if __name__ == "__main__":
    main()
