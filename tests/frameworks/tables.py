"""The tables of docs/frameworks.md: what was seen, and how it is written there."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import delete

from tests.frameworks.apps import FRAMEWORKS, Framework, django_app
from tests.frameworks.apps.database import Session
from tests.frameworks.scenarios import (
    BODIES,
    ERRORS,
    STREAMS,
    Scenario,
    describe,
    make_client,
    send,
)
from tests.frameworks.server import Client
from tests.frameworks.teardowns import TEARDOWNS, Teardown
from tests.support.models import Note
from wsgi_dbsession import SessionMiddleware

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.support.models import Database

DOCUMENT = Path(__file__).parents[2] / "docs" / "frameworks.md"
MOMENTS = ("complete", "headers", "close")
GROUPS: dict[str, tuple[Scenario, ...]] = {"errors": ERRORS, "bodies": BODIES, "streams": STREAMS}


def see(framework: Framework, scenario: Scenario, database: Database) -> str:
    """Send a scenario's request, and say what came of it."""
    answer = send(make_client(framework, scenario), scenario)
    return describe(answer, _take_notes(database))


def see_teardown(make_app: Teardown, moment: str, database: Database) -> str:
    """Send a request to an application with a hand-written teardown, and say what came of it."""
    answer = Client(SessionMiddleware(make_app(), Session, commit_on=moment)).send("GET", "/")  # type: ignore[arg-type]
    if answer.whole:  # what close() raises comes too late for the client
        answer.error = None
    words = describe(answer, _take_notes(database))
    return words.replace("rolled back", "**lost**") if answer.whole else words


def _take_notes(database: Database) -> list[str]:
    notes = database.notes()
    with database.observer.begin() as connection:
        connection.execute(delete(Note))
    return notes


def see_all(database: Database) -> dict[str, list[list[str]]]:
    """See everything.

    :return: the tables by name, each a list of rows, the header first.
    """
    tables = {}
    for name, scenarios in GROUPS.items():
        tables[name] = [["", *(scenario.title for scenario in scenarios)]]
        for framework in FRAMEWORKS:
            row = [_with_version(framework)]
            for scenario in scenarios:
                django_app.configure()
                row.append(see(framework, scenario, database))
            tables[name].append(row)
    tables["teardowns"] = [["", "hook", *(f'`commit_on="{moment}"`' for moment in MOMENTS)]]
    for framework in FRAMEWORKS:
        for hook, make_app in TEARDOWNS[framework.name].items():
            row = [_with_version(framework), hook]
            for moment in MOMENTS:
                django_app.configure()
                row.append(see_teardown(make_app, moment, database))
            tables["teardowns"].append(row)
    return tables


def _with_version(framework: Framework) -> str:
    if framework.distribution is None:
        return framework.name
    return f"{framework.name} {version(framework.distribution)}"


def write(document: str, tables: dict[str, list[list[str]]]) -> str:
    """Return the document with these tables in place of those of the same names."""
    for name, rows in tables.items():
        lines = [_line(rows[0]), _line(["---"] * len(rows[0])), *map(_line, rows[1:])]
        table = "\n".join(lines)
        place = _place(name).search(document)
        if place is None:
            raise ValueError(f"the document has no place for the table {name!r}")
        document = document[: place.start(2)] + table + document[place.end(2) :]
    return document


def read(document: str, name: str) -> list[list[str]]:
    """Return the rows of a table in the document, without its header and without versions."""
    found = _place(name).search(document)
    if found is None:
        raise ValueError(f"the document has no place for the table {name!r}")
    rows = [line.strip("| ").split(" | ") for line in found[2].splitlines()[2:]]
    return [[re.sub(r" \d\S*$", "", row[0]), *row[1:]] for row in rows]


def _place(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- table: {name} -->\n\n)(.*?)(\n\n<!-- end of table -->)", re.DOTALL)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
