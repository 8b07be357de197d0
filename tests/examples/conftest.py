"""The application of the demo, driven in this process."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import pytest

from tests.examples.test_examples import EXAMPLES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flask import Flask


@pytest.fixture
def guestbook(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package ``examples/guestbook``."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("guestbook")


@pytest.fixture
def app(guestbook: Any, tmp_path: Path) -> Iterator[Flask]:
    """The guestbook with an empty SQLite file; at the end no connection may be checked out."""
    made: Flask = guestbook.create_app(f"sqlite:///{tmp_path / 'guestbook.db'}")
    engine = guestbook.Session.session_factory.kw["bind"]
    yield made
    made.extensions["watch"].close()
    assert engine.pool.checkedout() == 0
    engine.dispose()
