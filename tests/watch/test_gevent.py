"""Under gevent, holders are greenlets."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def test_greenlets_are_told_apart(tmp_path: Path) -> None:
    """Each has its name and its lines, and the guard is a greenlet that lets them run."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "gevent.monkey", "--module", "tests.watch.gevent_holders"),
            f"sqlite:///{tmp_path / 'test.db'}",
        ],
        capture_output=True,
        check=False,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)

    one, two = found["holders"]
    assert [one["name"], two["name"]] == ["one", "two"]
    assert one["thread"] != two["thread"]
    for holder in (one, two):
        assert holder["thread"].startswith("greenlet ")
        assert holder["line"].endswith(" in hold")
        assert holder["now"].endswith(" in hold")
        assert holder["now"].startswith("at ")
    assert "connection held without a statement for 0." in found["messages"][0]
    assert " in hold, now at " in found["messages"][0]
    assert found["left"] == ["a greenlet that is gone", None]
    assert sorted(found["ended"]) == ["one", "two"]
