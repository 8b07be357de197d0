"""``__version__`` is that of the distribution."""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING

import wsgi_dbsession
from wsgi_dbsession import _version

if TYPE_CHECKING:
    import pytest


def test_the_version_is_that_of_the_distribution() -> None:
    """It is written down once, in pyproject.toml."""
    assert wsgi_dbsession.__version__ == metadata.version("wsgi_dbsession")


def test_a_copy_that_is_not_installed_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A project that ships the package inside of its own has no metadata of it."""

    def find_nothing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", find_nothing)
    assert importlib.reload(_version).__version__ == "unknown"
    monkeypatch.undo()
    assert importlib.reload(_version).__version__ == wsgi_dbsession.__version__
