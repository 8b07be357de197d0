"""Where a database is in its history, and the cookie by which a client carries that."""

from __future__ import annotations

import hmac
import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Self

_VERSION = "1"
_NAME = re.compile(r"[A-Za-z0-9_.-]+")


class Position(NamedTuple):
    """A place in PostgreSQL's write-ahead log, which a failover forks into a new timeline."""

    timeline: int
    lsn: int

    @classmethod
    def read(cls, timeline: int, lsn: str) -> Self:
        """Return the position that PostgreSQL writes as ``16/B374D848``."""
        high, _, low = lsn.partition("/")
        return cls(timeline, (int(high, 16) << 32) + int(low, 16))

    def covers(self, other: Position) -> bool:
        """Return whether whoever is here has everything up to there.

        The timeline counts on its own: a standby that still follows a former primary may be far
        along a branch that has come to nothing.
        """
        return self.timeline >= other.timeline and self.lsn >= other.lsn

    def join(self, other: Position) -> Position:
        """Return the first position that covers both."""
        return Position(max(self.timeline, other.timeline), max(self.lsn, other.lsn))


START = Position(0, 0)  # every replica is here
NOWHERE = Position(0, (1 << 64) - 1)  # no replica ever is here


class Cookies:
    """Writes positions into signed cookies, and reads them.

    Each position has a cookie of its own, whose name ends with it. With a common name, the
    response that arrives last would win, and of two requests that write at the same time, that
    may be the one which committed first.

    :param name: how their names begin.
    :param secret: the key of their signature.
    :param max_age: how many seconds a client keeps them.
    :param secure: whether a client sends them over HTTPS only.
    """

    def __init__(self, name: str, secret: str | bytes, max_age: int, *, secure: bool) -> None:
        key = secret.encode() if isinstance(secret, str) else secret
        if len(key) < 16:
            msg = (
                f"secret must have at least 16 bytes, got {len(key)}. Make one by "
                "secrets.token_hex(), and give it to all processes."
            )
            raise ValueError(msg)
        if not _NAME.fullmatch(name):
            msg = f"cookie must consist of letters, digits, '_', '.' and '-', got {name!r}"
            raise ValueError(msg)
        if max_age < 1:
            msg = f"max_age must be at least 1 second, got {max_age!r}"
            raise ValueError(msg)
        self.name = name
        self._named = re.compile(f"{re.escape(name)}-([0-9a-f]{{1,8}})-([0-9a-f]{{1,16}})")
        self._key = key
        self._max_age = max_age
        self._attributes = f"Path=/; HttpOnly; SameSite=Lax{'; Secure' * secure}"

    def headers(self, position: Position, former: str) -> Iterator[tuple[str, str]]:
        """Return the response headers that make a client carry this position.

        :param position: what the client has written up to.
        :param former: its request's ``Cookie`` header; what the new position covers is deleted.
        """
        name, value = self._write(position)
        yield (
            "Set-Cookie",
            f"{name}={value}; Max-Age={self._max_age}; {self._attributes}",
        )
        for other in set(self._read(former)):
            if other != position and position.covers(other):
                name, _ = self._write(other)
                yield "Set-Cookie", f"{name}=; Max-Age=0; {self._attributes}"

    def position(self, header: str) -> Position:
        """Return the first position that covers those of a ``Cookie`` header.

        What this secret has not signed is ignored.
        """
        found = START
        for position in self._read(header):
            found = found.join(position)
        return found

    def _read(self, header: str) -> Iterator[Position]:
        for pair in header.split(";"):
            name, _, value = pair.strip().partition("=")
            if place := self._named.fullmatch(name):
                position = Position(int(place[1], 16), int(place[2], 16))
                _, expected = self._write(position)
                if hmac.compare_digest(value.encode("latin-1", "replace"), expected.encode()):
                    yield position

    def _write(self, position: Position) -> tuple[str, str]:
        name = f"{self.name}-{position.timeline:x}-{position.lsn:x}"
        signature = hmac.digest(self._key, f"wsgi_dbsession {_VERSION} {name}".encode(), "sha256")
        return name, f"{_VERSION}.{signature.hex()[:32]}"
