"""Whether a statement writes, by its words."""

from __future__ import annotations

import pytest

from wsgi_dbsession.watch import _statement
from wsgi_dbsession.watch._statement import Reads, writes


@pytest.mark.parametrize(
    ("statement", "answer"),
    [
        ("SELECT 1", False),
        ("  (SELECT 1) UNION (SELECT 2)", False),
        ("/* a comment */ -- another\n select 1", False),
        ("INSERT INTO t VALUES (1)", True),
        ("/* SELECT */ update t SET x = 1", True),
        ("WITH a AS (SELECT 1) SELECT * FROM a", False),
        ("WITH a AS (DELETE FROM t RETURNING x) SELECT * FROM a", True),
        ("CREATE TABLE t (x)", True),
        ("CALL procedure()", None),
        ("", None),
        ("?", None),
    ],
)
def test_words_tell_whether_a_statement_writes(statement: str, answer: bool | None) -> None:
    """None where they do not tell."""
    assert writes(statement) is answer


def test_statements_that_read_are_remembered() -> None:
    """Only those, so that one look is enough for the next time."""
    reads = Reads()

    assert reads.classify("SELECT 1") is False
    assert reads.classify("DELETE FROM t") is True
    assert reads.classify("CALL f()") is None
    assert reads == {"SELECT 1"}


def test_what_is_remembered_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statements with literal values are different each time, and some are long."""
    monkeypatch.setattr(_statement, "_MOST", 2)
    reads = Reads()
    for number in range(3):
        reads.classify(f"SELECT {number}")
    reads.classify("SELECT " + "1" * 3000)

    assert reads == {"SELECT 2"}
