"""The comparison finds each kind of violation, and nothing in what is right."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from tests.soak.checks import audit
from tests.soak.databases import ACCOUNTS, START
from tests.soak.history import Books, Entry, Journal, Transfer

if TYPE_CHECKING:
    from tests.soak.history import Told

COMMITTED = (("hook", "commit"),)
ROLLED_BACK = (("hook", "rollback"),)
UNKNOWN = (("log", "unknown"),)


def kinds(
    told: Told,
    times: int,
    lines: tuple[tuple[str, str], ...] = (),
    *,
    work: str = "transfer",
    branch: int = 0,
    attempts: int = 0,
    deaths: tuple[float, ...] = (),
    error: int = 0,
    mount: str = "plain",
    **more: Any,
) -> list[str]:
    """Return what the comparison finds about one transfer."""
    options = {"tries": 1, "begun": 10.0, "ended": 11.0, **more}
    transfer = Transfer("t", mount, "list", work, told=told, **options)
    journal = Journal()
    for kind, what in lines:
        journal.add("t", kind, what)
    balances = dict.fromkeys(range(ACCOUNTS), START)
    balances[0] -= 5 * times + error
    balances[1] += 5 * times
    books = Books(
        [Entry("t", 0, 1, 5)] * times,
        balances,
        Counter({"t": branch}),
        Counter({"t": attempts}),
    )
    return [each.kind for each in audit([transfer], journal, books, deaths)]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param({"told": "success", "times": 1, "lines": COMMITTED}, id="success"),
        pytest.param({"told": "refusal", "times": 0, "lines": ROLLED_BACK}, id="refusal"),
        pytest.param({"told": "refusal", "times": 0}, id="refused before the application"),
        pytest.param({"told": "cut", "times": 0, "lines": ROLLED_BACK}, id="cut"),
        pytest.param({"told": "cut", "times": 1, "lines": COMMITTED}, id="cut after the commit"),
        pytest.param(
            {"told": "refusal", "times": 1, "lines": UNKNOWN}, id="logged as unknown, there"
        ),
        pytest.param(
            {"told": "refusal", "times": 1, "lines": ROLLED_BACK + UNKNOWN},
            id="retried, then logged as unknown",
        ),
        pytest.param(
            {"told": "refusal", "times": 0, "lines": UNKNOWN}, id="logged as unknown, not there"
        ),
        pytest.param(
            {"told": "silence", "times": 1, "deaths": (10.5,)}, id="killed after the commit"
        ),
        pytest.param(
            {"told": "cut", "times": 1, "deaths": (20.0,), "hung_up": True},
            id="killed long after the client had hung up",
        ),
        pytest.param(
            {"told": "refusal", "times": 1, "lines": (*COMMITTED, ("log", "commit"))},
            id="logged as committed, with an error afterwards",
        ),
        pytest.param(
            {"told": "success", "times": 1, "lines": ROLLED_BACK + COMMITTED, "tries": 2},
            id="a second try",
        ),
        pytest.param(
            {"told": "success", "times": 1, "lines": COMMITTED, "repeats": True},
            id="repeated, success",
        ),
        pytest.param(
            {"told": "refusal", "times": 1, "lines": UNKNOWN, "repeats": True, "tries": 2}
            | {"took_effect": True},
            id="repeated, and told that it took effect",
        ),
        pytest.param(
            {"told": "success", "times": 1, "lines": COMMITTED, "work": "two registries"}
            | {"branch": 1},
            id="in both databases",
        ),
        pytest.param(
            {"told": "refusal", "times": 1, "lines": (("log", "partial"),)}
            | {"work": "two registries"},
            id="logged as committed in part",
        ),
        pytest.param(
            {"told": "success", "times": 1, "lines": COMMITTED, "work": "inner block"}
            | {"attempts": 1},
            id="inner block",
        ),
        pytest.param(
            {"told": "refusal", "times": 0, "work": "inner block", "attempts": 1},
            id="inner block of a request that failed",
        ),
    ],
)
def test_what_is_right_passes(case: dict[str, Any]) -> None:
    """No violation is found."""
    assert kinds(**case) == []


@pytest.mark.parametrize(
    ("case", "found"),
    [
        ({"told": "success", "times": 0}, "success without its transfer"),
        ({"told": "success", "times": 2, "lines": COMMITTED}, "transfer twice"),
        (
            {"told": "refusal", "times": 1, "lines": COMMITTED},
            "refusal, but the transfer is there",
        ),
        (
            {"told": "unsent", "times": 1, "lines": COMMITTED, "tries": 0},
            "transfer that was never sent",
        ),
        (
            {"told": "refusal", "times": 1, "lines": COMMITTED, "repeats": True},
            "repeated until it had an answer, and no transfer",
        ),
        (
            {"told": "cut", "times": 0, "repeats": True},
            "repeated until it had an answer, and no transfer",
        ),
        (
            {"told": "success", "times": 0, "lines": COMMITTED},
            "hook of a commit that did not take place",
        ),
        ({"told": "success", "times": 1, "lines": COMMITTED * 2}, "hook twice"),
        (
            {"told": "success", "times": 1, "lines": (*COMMITTED, ("hook", "dropped"))},
            "hook of a savepoint that was rolled back",
        ),
        (
            {"told": "cut", "times": 1, "lines": ROLLED_BACK},
            "hook of a rollback that did not take place",
        ),
        ({"told": "success", "times": 1}, "commit without its hook"),
        ({"told": "silence", "times": 1, "deaths": (20.0,)}, "commit without its hook"),
        (
            {"told": "success", "times": 1, "lines": COMMITTED, "work": "two registries"},
            "in one database only",
        ),
        (
            {"told": "success", "times": 1, "lines": (*COMMITTED, *UNKNOWN)}
            | {"work": "two registries", "branch": 0},
            "in one database only",
        ),
        (
            {"told": "refusal", "times": 1, "lines": (("log", "partial"),)}
            | {"work": "two registries", "mount": "two-phase"},
            "in one database only",
        ),
        (
            {"told": "success", "times": 1, "lines": COMMITTED, "work": "inner block"},
            "inner block lost",
        ),
        (
            {"told": "success", "times": 1, "lines": COMMITTED, "error": 1},
            "balance without its transfers",
        ),
    ],
)
def test_a_violation_is_found(case: dict[str, Any], found: str) -> None:
    """Each kind is found, with its own name."""
    assert found in kinds(**case)


def test_a_transfer_that_no_client_wanted_is_found() -> None:
    """The books have a token that no client sent."""
    books = Books([Entry("?", 0, 1, 0)], dict.fromkeys(range(ACCOUNTS), START))

    found = audit([], Journal(), books)

    assert [each.kind for each in found] == ["transfer that no client has sent"]


def test_a_violation_has_its_history() -> None:
    """What was told, what is in the books, and the lines of the journal."""
    journal = Journal()
    journal.add("t", "log", "rollback", "POST /t: discarding")
    transfer = Transfer("t", "plain", "list", "transfer", told="success", status=201, tries=1)
    books = Books([], dict.fromkeys(range(ACCOUNTS), START))

    (violation,) = audit([transfer], journal, books)

    assert violation.asdict() == {
        "kind": "success without its transfer",
        "token": "t",
        "history": [
            "plain: list, transfer",
            "told success 201, sent 1 times",
            "in the books 0 times, in the branch 0",
            "log rollback POST /t: discarding",
        ],
    }
