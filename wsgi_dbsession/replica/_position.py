"""A position in the database's write-ahead log, and the cookies that carry it."""

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
    """A position in PostgreSQL's write-ahead log. A failover starts a new timeline of the log."""

    timeline: int
    lsn: int

    @classmethod
    def read(cls, timeline: int, lsn: str) -> Self:
        """Return the position with this LSN, in PostgreSQL's notation: ``16/B374D848``."""
        high, _, low = lsn.partition("/")
        return cls(timeline, (int(high, 16) << 32) + int(low, 16))

    def covers(self, other: Position) -> bool:
        """Return whether a server at this position has replayed everything up to the other one.

        The LSN alone does not suffice: a standby that still follows a former primary may be
        further in the log, on a branch without the write.
        """
        return self.timeline >= other.timeline and self.lsn >= other.lsn

    def join(self, other: Position) -> Position:
        """Return the lowest position that covers both."""
        return Position(max(self.timeline, other.timeline), max(self.lsn, other.lsn))


START = Position(0, 0)  # each replica covers it
NOWHERE = Position(0, (1 << 64) - 1)  # no replica covers it


class Cookies:
    """Writes positions into signed cookies, and reads them.

    Each position has its own cookie, whose name ends with the position. A common name would let
    the response that arrives last win. Of two concurrent requests that write, that may be the one
    that committed first.

    :param name: the prefix of the cookies' names.
    :param secret: the key of the signature.
    :param max_age: for how many seconds clients keep the cookies.
    :param secure: whether clients send the cookies over HTTPS only.
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
        """Return the response headers that set the cookie of a position.

        They also delete the client's cookies of other positions that this one covers.

        :param position: the position after the client's last write.
        :param former: the ``Cookie`` header of the request.
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
        """Return the lowest position that covers all positions of a ``Cookie`` header.

        Cookies that were not signed with this secret are ignored.
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
