"""The Python code in README.md and docs/ runs as it stands there."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import Engine
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_code_of_a_document_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its blocks run in order, each building on those before it, hence as one test."""
    # The examples write "sqlite:///app.db"; not into the source tree.
    monkeypatch.chdir(tmp_path)
    document = Sybil([PythonCodeBlockParser(), SkipParser()], path=str(ROOT)).parse(path)
    # Flask looks for the files of the module it is given.
    document.namespace["__name__"] = __name__

    try:
        for example in document.examples():
            example.evaluate()
    finally:
        for value in document.namespace.values():
            if isinstance(value, Engine):
                value.dispose()
