"""Decides what became of the transactions that were prepared, and then left alone.

That is the work of an operator: a process was killed, or lost its connection, between the two
phases. What is committed in one database is committed in the other, and else rolled back.
"""

from __future__ import annotations

import contextlib
import json
import threading
from typing import TYPE_CHECKING

from typing_extensions import Self

if TYPE_CHECKING:
    from pathlib import Path

    from tests.soak.databases import PostgreSQL

PATIENCE = 4  # seconds, long after a process that lives would have committed


class Resolver:
    """Looks for them until the block ends, and once more then.

    :param journal: where the application wrote which transfer each of them belongs to.
    """

    def __init__(self, database: PostgreSQL, journal: Path) -> None:
        self.resolved = 0
        self._database = database
        self._journal = journal
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(30)
        self._resolve(0)

    def _run(self) -> None:
        while not self._end.wait(1):
            with contextlib.suppress(OSError, self._database.error):  # it may restart just now
                self._resolve(PATIENCE)

    def _resolve(self, age: int) -> None:
        rows = self._database.fetch(
            "postgres",
            "SELECT gid, database FROM pg_prepared_xacts"
            f" WHERE prepared <= now() - interval '{age} s'",
        )
        if not rows:
            return
        tokens = self._tokens()
        decisions = [(gid, name, self._is_committed(tokens[gid])) for gid, name in rows]
        for gid, name, committed in decisions:
            verb = "COMMIT" if committed else "ROLLBACK"
            # The process may have come back to it in the meantime.
            with contextlib.suppress(self._database.missing):
                self._database.fetch(name, f"{verb} PREPARED '{gid}'")
                self.resolved += 1

    def _is_committed(self, token: str) -> bool:
        return any(
            self._database.fetch(name, f"SELECT 1 FROM entry WHERE token = '{token}' LIMIT 1")
            for name in ("bank", "branch")
        )

    def _tokens(self) -> dict[str, str]:
        found = {}
        for line in self._journal.read_text().splitlines():
            if '"gid"' in line:
                token, kind, what, _ = json.loads(line)
                if kind == "gid":
                    found[what] = token
        return found
