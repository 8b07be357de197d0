"""The prose of docs/ and of the pages beside it keeps to the style guide."""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING

import pytest

from tests.docs.pages import DOCS, ROOT
from tests.docs.prose import faults

if TYPE_CHECKING:
    from pathlib import Path

#: made from a file elsewhere
INCLUDED = {"benchmarks.md", "changes.md"}
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(path for path in DOCS.rglob("*.md") if path.name not in INCLUDED),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_sentences_are_short_and_have_a_line_each(page: Path) -> None:
    """One sentence a line, one fact a sentence, and none of the words to avoid."""
    assert faults(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("folder", ["wsgi_dbsession", "tests", "examples", "benchmarks"])
def test_docstrings_and_comments_name_the_actor(folder: str) -> None:
    """They never say "nobody", in capitals or not: only the system user has that name."""
    found = []
    for path in (ROOT / folder).rglob("*.py"):
        code = path.read_text(encoding="utf-8")
        prose = re.findall(r"(?:^| )# .*", code, re.MULTILINE)
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                prose.append(ast.get_docstring(node) or "")
        found += [(path.name, text) for text in prose if re.search(r"(?i)\bnobody\b", text)]
    assert [each for each in found if each[0] != "test_prose.py"] == []


@pytest.mark.parametrize(
    ("document", "fault"),
    [
        pytest.param("One. Two.", "more than one sentence", id="two sentences"),
        pytest.param("A sentence that\ngoes on.", "goes on in the next line", id="a broken line"),
        pytest.param(f"{'word ' * 26}end.", "27 words", id="a long sentence"),
        pytest.param("One: two: three.", "more than one colon", id="two colons"),
        pytest.param("Nobody, but nobody, knows.", "name the actor", id="nobody"),
        pytest.param("- It has a life of its own.", "its own", id="in a list"),
    ],
)
def test_a_fault_is_found(document: str, fault: str) -> None:
    """Each rule has a sentence that breaks it."""
    assert any(fault in each for each in faults(document))


@pytest.mark.parametrize(
    "document",
    [
        "A sentence, e.g. This one.",
        "```python\nnobody(in_code)\n```",
        "| a table | without end |",
        "# A heading",
        "1. An item with [a link](https://example.org/a.b) and `code. Here`.",
        "A sentence before a list:",
        f"{'word ' * 24}end.",
    ],
)
def test_what_is_no_fault_passes(document: str) -> None:
    """Code, tables and headings are no sentences."""
    assert faults(document) == []
