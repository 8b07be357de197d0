"""As much of the PostgreSQL and MySQL protocols as counting and finding a COMMIT takes."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class Wire:
    """Follows one connection, from what its two sides send."""

    def __init__(self) -> None:
        self.round_trips = 0
        self.sent = 0
        self.received = 0
        self.unreadable = ""
        self._logged_in = False
        self._from_client = bytearray()
        self._from_server = bytearray()

    def from_client(self, block: bytes) -> bool:
        """Take what the client sent, and return whether a COMMIT is among it."""
        raise NotImplementedError

    def from_server(self, block: bytes) -> bool:
        """Take what the server sent, and return whether a COMMIT took place according to it."""
        raise NotImplementedError


class PostgreSQL(Wire):
    """The protocol of PostgreSQL, version 3, and of PgBouncer."""

    ENCRYPTION = (80877103, 80877104)  # SSLRequest, GSSENCRequest
    CANCEL = 80877102
    # Query, Sync and FunctionCall: the server answers each with ReadyForQuery.
    DEMANDS = b"QSF"

    def __init__(self) -> None:
        super().__init__()
        self._started = False
        self._asked_for_encryption = False
        self._unanswered = 0

    def from_client(self, block: bytes) -> bool:
        self._from_client += block
        commits = False
        while not self._started and len(self._from_client) >= 8 and not self.unreadable:
            length, code = struct.unpack_from("!ii", self._from_client)
            if len(self._from_client) < length:
                return False
            del self._from_client[:length]
            self._asked_for_encryption = code in self.ENCRYPTION
            self._started = not self._asked_for_encryption and code != self.CANCEL
        for kind, payload in self._messages(self._from_client):
            if not self._logged_in:
                continue  # a password
            self.sent += 1
            if kind in self.DEMANDS:
                self.round_trips += not self._unanswered
                self._unanswered += 1
            if kind in b"QP":
                # The name of the prepared statement precedes the text.
                statement = payload if kind in b"Q" else payload.partition(b"\0")[2]
                commits |= statement.lstrip()[:6].upper() == b"COMMIT"
        return commits

    def from_server(self, block: bytes) -> bool:
        if self._asked_for_encryption:
            self._asked_for_encryption = False
            if block[:1] != b"N":
                self.unreadable = "the server speaks TLS, which the client asked for"
            block = block[1:]
        self._from_server += block
        committed = False
        for kind, payload in self._messages(self._from_server):
            self.received += self._logged_in
            if kind in b"Z":  # ReadyForQuery
                self._unanswered -= self._logged_in
                self._logged_in = True
            committed |= kind in b"C" and payload == b"COMMIT\0"
        return committed

    def _messages(self, buffer: bytearray) -> Iterator[tuple[bytes, bytes]]:
        while self._started and len(buffer) >= 5 and not self.unreadable:
            (length,) = struct.unpack_from("!i", buffer, 1)
            if len(buffer) < length + 1:
                return
            kind, payload = bytes(buffer[:1]), bytes(buffer[5 : length + 1])
            del buffer[: length + 1]
            yield kind, payload


class MySQL(Wire):
    """The protocol of MySQL, version 10, and of MariaDB; a message is a packet."""

    # COM_QUIT, COM_STMT_SEND_LONG_DATA and COM_STMT_CLOSE: the server does not answer.
    UNANSWERED = b"\x01\x18\x19"
    COM_QUERY = b"\x03"
    CLIENT_SSL = 0x800
    SSL_REQUEST = 32  # bytes: the response to the greeting without what follows the flags

    def __init__(self) -> None:
        super().__init__()
        self._commits = False

    def from_client(self, block: bytes) -> bool:
        self._from_client += block
        commits = False
        for sequence, payload in self._packets(self._from_client):
            if not self._logged_in:
                (flags,) = struct.unpack_from("<H", payload.ljust(2, b"\0"))
                if len(payload) == self.SSL_REQUEST and flags & self.CLIENT_SSL:
                    self.unreadable = "the client asked for TLS"
                continue
            self.sent += 1
            if sequence == 0 and payload[:1] not in self.UNANSWERED:
                self.round_trips += 1
                self._commits = (
                    payload[:1] == self.COM_QUERY and payload[1:].lstrip()[:6].upper() == b"COMMIT"
                )
                commits |= self._commits
        return commits

    def from_server(self, block: bytes) -> bool:
        self._from_server += block
        committed = False
        for _, payload in self._packets(self._from_server):
            is_ok = payload[:1] == b"\0"
            self.received += self._logged_in
            committed |= self._commits and is_ok
            self._commits = False
            self._logged_in |= is_ok
        return committed

    def _packets(self, buffer: bytearray) -> Iterator[tuple[int, bytes]]:
        while len(buffer) >= 4 and not self.unreadable:
            length = int.from_bytes(buffer[:3], "little")
            if len(buffer) < length + 4:
                return
            sequence, payload = buffer[3], bytes(buffer[4 : length + 4])
            del buffer[: length + 4]
            yield sequence, payload
