"""Collects the Python code in README.md and docs/ as tests."""

from __future__ import annotations

import os
import shutil
import tempfile
from typing import Any

import pytest
from sqlalchemy import Engine
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser


def _enter_directory(namespace: dict[str, Any]) -> None:
    # Flask looks for the files of the module it is given.
    namespace["__name__"] = __name__
    # The examples write "sqlite:///app.db"; not into the source tree.
    namespace["_back"] = os.getcwd()
    namespace["_directory"] = tempfile.mkdtemp()
    os.chdir(namespace["_directory"])


def _leave_directory(namespace: dict[str, Any]) -> None:
    for value in namespace.values():
        if isinstance(value, Engine):
            value.dispose()
    os.chdir(namespace["_back"])
    shutil.rmtree(namespace["_directory"])


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/*.md"],
    setup=_enter_directory,
    teardown=_leave_directory,
).pytest()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the code of one document in one worker: each block builds on those before it."""
    for item in items:
        if item.path.suffix == ".md":
            item.add_marker(pytest.mark.xdist_group(item.path.name))
