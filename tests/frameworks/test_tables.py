"""docs/frameworks.md says what is seen; see also ``test_every_framework.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.frameworks.apps import FRAMEWORKS
from tests.frameworks.tables import (
    DOCUMENT,
    GROUPS,
    MOMENTS,
    read,
    see_teardown,
    write,
)
from tests.frameworks.teardowns import TEARDOWNS

if TYPE_CHECKING:
    from tests.support.models import Database


@pytest.mark.parametrize(
    ("framework", "hook"),
    [
        pytest.param(framework, hook, id=f"{framework}: {hook}")
        for framework, hooks in TEARDOWNS.items()
        for hook in hooks
    ],
)
def test_the_document_tells_which_hooks_lose_the_writes(
    framework: str, hook: str, shop: Database
) -> None:
    """A ``Session.remove()`` left in a hook that runs before the outcome loses everything."""
    seen = [see_teardown(TEARDOWNS[framework][hook], moment, shop) for moment in MOMENTS]

    rows = read(DOCUMENT.read_text(encoding="utf-8"), "teardowns")
    assert [framework, hook, *seen] in rows


def test_the_document_has_no_other_rows() -> None:
    """Nothing is told of what the suite does not see."""
    document = DOCUMENT.read_text(encoding="utf-8")

    for group in GROUPS:
        assert [row[0] for row in read(document, group)] == [each.name for each in FRAMEWORKS]
    assert len(read(document, "teardowns")) == sum(map(len, TEARDOWNS.values()))


def test_writing_a_table_and_reading_it_is_the_same() -> None:
    """The writer puts a table into its place only, and the reader drops the version."""
    document = "before\n<!-- table: t -->\n\nold\n\n<!-- end of table -->\nafter"

    document = write(document, {"t": [["", "a"], ["Flask 3.1.3", "200; committed"]]})

    assert read(document, "t") == [["Flask", "200; committed"]]
    assert document.startswith("before\n")
    assert document.endswith("\nafter")
    with pytest.raises(ValueError, match="no place for the table 'other'"):
        write(document, {"other": [[""]]})
    with pytest.raises(ValueError, match="no place for the table 'other'"):
        read(document, "other")
