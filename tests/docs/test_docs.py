"""The Python code in README.md and docs/ runs as it stands there."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import Engine
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

if TYPE_CHECKING:
    from tests.support.postgres import Server

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_code_of_a_document_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Its blocks run in order, each building on those before it, hence as one test."""
    if '"DATABASE_URL"' in path.read_text(encoding="utf-8"):
        server: Server = request.getfixturevalue("postgres_server")
        url = server.create_database(f"docs_{os.getpid()}")
        monkeypatch.setenv("DATABASE_URL", url.render_as_string(hide_password=False))
    # The examples write "sqlite:///app.db"; not into the source tree.
    monkeypatch.chdir(tmp_path)
    document = Sybil([PythonCodeBlockParser(), SkipParser()], path=str(ROOT)).parse(path)
    # Flask looks for the files of the module it is given, RQ for the functions in it.
    module = ModuleType("page")
    module.__file__ = str(tmp_path / "page.py")
    monkeypatch.setitem(sys.modules, "page", module)
    document.namespace = vars(module)

    try:
        for example in document.examples():
            example.evaluate()
    finally:
        for value in document.namespace.values():
            if isinstance(value, Engine):
                value.dispose()
