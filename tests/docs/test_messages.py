"""docs/troubleshooting.md has every message of the package, and no other as one of its."""

from __future__ import annotations

import re

import pytest

from tests.docs.messages import DOCUMENT, Message, all_messages, read_messages, rows
from tests.frameworks.tables import write

PAGE = DOCUMENT.read_text(encoding="utf-8")
#: what `Commit.explain()` says, as the part of a line that varies
EXPLANATIONS = (
    "commit failed, rolled back",
    "connection lost during COMMIT, outcome unknown",
    "partly committed",
    "committed, but something failed afterwards",
)


def test_every_message_is_on_the_page() -> None:
    """``python -m tests.docs.messages`` writes those that are new."""
    assert len(all_messages()) > 40
    missing = [row[0] for row in rows() if row[0] not in PAGE]
    assert missing == [], "python -m tests.docs.messages"
    assert write(PAGE, {"messages": rows()}) == PAGE, "python -m tests.docs.messages"


def test_every_section_is_about_a_real_message() -> None:
    """A heading in quotation marks begins a message, those of SQLAlchemy aside."""
    ours, _, _ = PAGE.partition("## Messages of SQLAlchemy")
    texts = [*EXPLANATIONS, *(each.text for each in all_messages())]
    headings = re.findall(r'^## "(.*)"$', ours, re.MULTILINE)
    assert len(headings) > 10

    assert [each for each in headings if not any(each in text for text in texts)] == []


@pytest.mark.parametrize(
    ("source", "texts"),
    [
        pytest.param('raise ValueError("a is wrong")', {"a is wrong"}, id="a literal"),
        pytest.param('raise ValueError(f"got {a!r}, no")', {"got …, no"}, id="with a gap"),
        pytest.param('log.info("%s: begins %d", a, b)', {"…: begins …"}, id="a log line"),
        pytest.param(
            'm = "first"\nm = "second"\nraise A_Error(m)', {"second"}, id="the last name"
        ),
        pytest.param(
            'if a:\n    m = "one way"\nelse:\n    m = "other way"\nraise A_Error(m)',
            {"one way", "other way"},
            id="either branch",
        ),
        pytest.param(
            'f = "fix it"\nif a:\n    f = "leave it"\nraise A_Error(f"bad. {f}")',
            {"bad. fix it", "bad. leave it"},
            id="a part that depends",
        ),
        pytest.param(
            'if a:\n    m = "gone"\n    raise A_Error(m)\nm = "later"\nraise B_Error(m)',
            {"gone", "later"},
            id="a branch that does not go on",
        ),
        pytest.param(
            'def f():\n    for a in b:\n        with c:\n            raise A_Error("deep" + d)',
            {"deep…"},
            id="nested blocks",
        ),
        pytest.param('m = "one"\ndef f():\n    return A_Error(m)', {"one"}, id="a constant"),
        pytest.param("raise", set(), id="none"),
        pytest.param("raise A_Error(a)", set(), id="nothing but a gap"),
    ],
)
def test_messages_are_read_from_source(source: str, texts: set[str]) -> None:
    """The reader follows what a name may be."""
    assert {each.text for each in read_messages(source, "module")} == texts


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ('raise exc.DBError("words")', "DBError"),
        ('log.exception("words")', "ERROR"),
        ('warnings.warn("words", ResourceWarning, stacklevel=2)', "ResourceWarning"),
        ('warnings.warn("words")', "UserWarning"),
    ],
)
def test_the_kind_of_a_message_is_told(source: str, kind: str) -> None:
    """An exception by its class, a log line by its level."""
    assert read_messages(source, "module") == {Message("words", kind, "module")}
