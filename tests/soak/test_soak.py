"""Two minutes of the bank: every control is caught, and no promise is broken.

``make soak MINUTES=60`` runs it for longer. ``SOAK_SEED`` and ``SOAK_DB`` choose the seed and the
database; what the seed fixes are the drivers, the isolation levels, the requests and the faults,
not how these meet. One run in three is on MariaDB, where that is installed.
"""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pytest

from tests.servers.client import Seen
from tests.soak import page
from tests.soak.clients import Shape, interpret, is_final
from tests.soak.databases import DATABASES
from tests.soak.run import Caught, Run, run
from tests.soak.segment import Result

if TYPE_CHECKING:
    from pathlib import Path

    from tests.soak.history import Told

CIRCUMSTANCES = {"date": "today", "commit": "abc", "machine": "a machine", "versions": "1"}
VIOLATION = {"kind": "transfer twice", "token": "t-1", "history": ["in the books 2 times"]}


@pytest.mark.long
@pytest.mark.servers
@pytest.mark.promise("no false success", "no silent loss", "truth", "cleanup")
@pytest.mark.timeout(1800)
def test_the_bank_keeps_its_books() -> None:
    """Real servers, raw sockets, faults: what clients were told is what the books say."""
    seed = int(os.environ.get("SOAK_SEED") or random.SystemRandom().randrange(1 << 32))
    name = "mariadb" if seed % 3 == 0 and shutil.which("mariadbd") else "postgres"
    name = os.environ.get("SOAK_DB") or name
    with DATABASES[name]() as database:
        made = run(database, minutes=2, seed=seed)

    results = {**made.asdict(), **CIRCUMSTANCES}
    assert page.failures(results) == [], f"SOAK_SEED={seed} SOAK_DB={name}"
    assert made.transfers > 0


def make_run(*violations: dict[str, Any], caught: bool = True) -> dict[str, Any]:
    """Return the results of a small run, as they are kept."""
    result = Result("waitress 0", "waitress", "psycopg, SERIALIZABLE", 10.0, 7)
    result.told = {"plain: list, transfer": {"success": 4, "refusal": 2, "cut": 1}}
    result.faults, result.felt = {"COMMIT is lost": 3}, {"COMMIT is lost": 2}
    result.violations = list(violations)
    made = Run(7, "PostgreSQL", 2, 120.0)
    made.segments.append(result)
    made.controls.append(Caught("no veto", "it commits", {"transfer twice": 2}, caught))
    return {**asdict(made), **CIRCUMSTANCES}


def test_the_report_counts(tmp_path: Path) -> None:
    """Transfers, controls, and what the clients were told, with two pictures."""
    results = make_run()

    text = page.render(results, tmp_path)

    assert "| transfers | **7** |" in text
    assert "| controls that were caught | **1 of 1** |" in text
    assert "| waitress | 4 | 2 | 1 | 0 |" in text
    assert "| no veto | it commits | yes | transfer twice (2) |" in text
    assert text.endswith("## Violations\n\nNone.\n")
    assert page.failures(results) == []
    for name in ("soak-servers.svg", "soak-faults.svg"):
        assert f"({name})" in text
        assert (tmp_path / name).read_text().startswith("<svg")


def test_a_violation_fails_the_run(tmp_path: Path) -> None:
    """It is in the report, with its history."""
    results = make_run(VIOLATION)

    assert page.failures(results) == ["transfer twice: t-1: in the books 2 times"]
    assert "- **transfer twice**: `t-1`\n  - `in the books 2 times`" in page.render(
        results, tmp_path
    )


def test_a_blind_checker_fails_the_run(tmp_path: Path) -> None:
    """A control that was not caught is a failure, without any violation."""
    results = make_run(caught=False)

    assert page.failures(results) == ["NOT CAUGHT: no veto"]
    assert "| no veto | it commits | **no** |" in page.render(results, tmp_path)


@pytest.mark.parametrize(
    ("seen", "told"),
    [
        (Seen(status=201, whole=True), "success"),
        (Seen(status=201, whole=False), "cut"),
        (Seen(status=500, whole=True), "refusal"),
        (Seen(status=500, whole=False), "cut"),
        (Seen(status=302, whole=True), "refusal"),
        (Seen(), "silence"),
        (Seen(ended="timeout"), "silence"),
    ],
)
def test_a_client_knows_what_it_was_told(seen: Seen, told: Told) -> None:
    """Only a whole 2xx is a success, and a response that was cut says nothing."""
    assert interpret(seen) == told


def test_a_client_repeats_until_it_has_an_answer() -> None:
    """A refusal is none, unless it says that the request took effect."""
    transfer = Shape("keys", "list", "transfer", repeats=True).begin("t")
    told: list[Told] = ["unsent", "silence", "cut", "refusal", "success"]
    finals = []
    for transfer.told in told:
        finals.append(is_final(transfer))
    transfer.told, transfer.took_effect = "refusal", True

    assert finals == [False, False, False, False, True]
    assert is_final(transfer)
