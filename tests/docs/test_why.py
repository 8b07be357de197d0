"""docs/why.md says of each alternative what is seen."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.docs.alternatives import ALTERNATIVES, DOCUMENT, SITUATIONS, see
from tests.docs.pages import ROOT

if TYPE_CHECKING:
    from tests.support.models import Database

PAGE = DOCUMENT.read_text(encoding="utf-8")


def cells() -> dict[tuple[str, str], str]:
    """Return the table of the page, by alternative and situation."""
    found = re.search(r"<!-- table: alternatives -->\n\n(.*?)\n\n<!--", PAGE, re.DOTALL)
    assert found is not None
    rows = [line.strip("|").split("|") for line in found[1].splitlines()]
    (_, *alternatives), _, *rest = [[cell.strip() for cell in row] for row in rows]
    return {
        (alternative, situation): cell
        for situation, *row in rest
        for alternative, cell in zip(alternatives, row, strict=True)
    }


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_the_table_says_what_is_seen(
    alternative: str, situation: str, sqlite_database: Database
) -> None:
    """Each cell is what a client gets, and what is in the database afterwards."""
    assert cells()[alternative, situation] == see(alternative, situation, sqlite_database)


def test_the_table_has_nothing_else() -> None:
    """Each cell is one that is looked at."""
    assert set(cells()) == {(a, s) for a in ALTERNATIVES for s in SITUATIONS}


def test_no_cell_of_ours_is_bold() -> None:
    """The two promises, in the terms of the table."""
    assert not [
        cell for (name, _), cell in cells().items() if name == "wsgi_dbsession" and "*" in cell
    ]


@pytest.mark.parametrize(
    ("phrase", "row", "column", "number"),
    [
        ("2.4 µs more", r"list: \*\*wsgi_dbsession\*\*", 2, "+2.4"),
        ("teardown | 1.9 µs", r"list: thread-local registry", 2, "+1.9"),
        ("repoze.tm2 | 6.7 µs", r"list: repoze.tm2", 2, "+6.7"),
    ],
    ids=["ours", "thread-local", "repoze.tm2"],
)
def test_the_figures_are_those_of_the_benchmarks(
    phrase: str, row: str, column: int, number: str
) -> None:
    """They were not copied wrongly, and follow the next run."""
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    found = re.search(rf"^\| {row} \|(.*)\|$", results, re.MULTILINE)
    assert found is not None
    cell = found[1].split("|")[column - 1].strip()

    assert phrase in PAGE
    assert f"{float(cell):+.1f}" == number


@pytest.mark.parametrize(
    ("phrase", "row"),
    [
        ("SQLite in memory needs {} % more instructions", "SELECT, list, watched"),
        ("under Flask {} %", "SELECT, Flask, watched"),
    ],
)
def test_the_cost_of_a_watch_is_that_of_the_benchmarks(phrase: str, row: str) -> None:
    """docs/watch.md says the share, which RESULTS.md leaves to the reader."""
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    found = re.search(rf"^\| {row} \| ([\d.]+) \|[^|]*\| \+([\d.]+) \|", results, re.MULTILINE)
    assert found is not None
    percent = f"{100 * float(found[2]) / float(found[1]):.1f}"

    assert phrase.format(percent) in (ROOT / "docs" / "watch.md").read_text(encoding="utf-8")
