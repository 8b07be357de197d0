"""What happened: what each client was told, the journal of the application, and the books."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pathlib import Path

#: "success" is a whole 2xx, "refusal" a whole response with another status. With "cut" and
#: "silence" the client knows nothing; "unsent" never reached a server.
Told = Literal["success", "refusal", "cut", "silence", "unsent"]


@dataclass
class Transfer:
    """One thing that a client wanted, and what it was told about it."""

    token: str
    mount: str
    body: str
    work: str
    version: str = "1.1"
    #: how often the client sent it; more than once only where it repeats until it has an answer
    tries: int = 0
    repeats: bool = False
    begun: float = 0.0
    ended: float = 0.0
    told: Told = "unsent"
    status: int | None = None
    hung_up: bool = False
    #: the application said so, in place of a response that it has not stored
    took_effect: bool = False

    @property
    def shape(self) -> str:
        """What it looked like, in two or three words."""
        old = ", HTTP/1.0" if self.version == "1.0" else ""
        return f"{self.mount}: {self.body}, {self.work}{old}"


@dataclass
class Line:
    """A line of the journal."""

    kind: str
    what: str
    more: str = ""


class Journal:
    """What the application wrote down, process by process: hooks, the package's log, gids."""

    def __init__(self, path: Path | None = None) -> None:
        self.lines: dict[str, list[Line]] = defaultdict(list)
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                token, kind, what, more = json.loads(line)
                self.add(token, kind, what, more)

    def add(self, token: str, kind: str, what: str, more: str = "") -> None:
        """Add a line about a token."""
        self.lines[token].append(Line(kind, what, more))

    def count(self, token: str, kind: str, what: str) -> int:
        """Return how many lines of this kind there are about a token."""
        return sum((line.kind, line.what) == (kind, what) for line in self.lines.get(token, ()))

    def is_open(self, token: str) -> bool:
        """Return whether the log says that the outcome is unknown, or that a part is committed."""
        return any(
            line.kind == "log" and line.what in ("unknown", "partial")
            for line in self.lines.get(token, ())
        )

    def is_told(self, token: str) -> bool:
        """Return whether the log says that the commit took place, and something failed then."""
        return self.count(token, "log", "commit") > 0

    def text(self, token: str) -> list[str]:
        """Return the lines about a token, to be read."""
        return [
            f"{line.kind} {line.what} {line.more}".rstrip() for line in self.lines.get(token, ())
        ]


@dataclass
class Entry:
    """One transfer in the books."""

    token: str
    source: int
    target: int
    amount: int


@dataclass
class Books:
    """What the databases say, after everything has come to rest."""

    entries: list[Entry] = field(default_factory=list)
    balances: dict[int, int] = field(default_factory=dict)
    #: how often each token is in the second database
    branch: Counter[str] = field(default_factory=Counter)
    #: how often each token is in the table that the inner blocks write
    attempts: Counter[str] = field(default_factory=Counter)


@dataclass
class Violation:
    """A promise that was broken, with its history."""

    kind: str
    token: str
    history: list[str]

    def asdict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {"kind": self.kind, "token": self.token, "history": self.history}
