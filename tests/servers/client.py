"""An HTTP client on a raw socket that reports what a client sees, and forgives nothing."""

from __future__ import annotations

import socket
import struct
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from typing_extensions import Self

if TYPE_CHECKING:
    from collections.abc import Iterable

Framing = Literal["none", "length", "chunked", "close"]
Ended = Literal["open", "closed", "reset", "timeout"]


@dataclass
class Seen:
    """What one response looked like from the client's end of the wire."""

    status: int | None = None
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
    framing: Framing = "close"
    whole: bool = False
    ended: Ended = "open"
    raw_head: bytes = b""

    def header(self, name: str) -> str | None:
        """Return the first value of a header."""
        return next((v for k, v in self.headers if k.lower() == name.lower()), None)

    @property
    def kind(self) -> str:
        """The response in a word or two, as the tables of the documentation put it."""
        if self.status is None:
            return "timeout" if self.ended == "timeout" else "no answer"
        if self.ended == "timeout":
            return f"{self.status}, then silence"
        return f"{self.status}" if self.whole else f"{self.status}, cut"

    @property
    def reusable(self) -> bool:
        """True if the server lets the client send another request on the connection."""
        return (
            self.ended == "open"
            and self.raw_head.startswith(b"HTTP/1.1")
            and (self.header("connection") or "").lower() != "close"
        )

    @property
    def success(self) -> bool:
        """True if the client holds a whole 2xx, and so believes that its work is saved."""
        return self.whole and self.status is not None and 200 <= self.status < 300


class Connection:
    """One connection to a server; requests on it follow one another (keep-alive)."""

    def __init__(self, port: int, *, timeout: float = 15.0, receive_buffer: int | None = None):
        self.port = port
        self.timeout = timeout
        self.receive_buffer = receive_buffer
        self.open()

    def open(self) -> None:
        """Connect, or connect anew."""
        self.socket = socket.socket()
        self.socket.settimeout(self.timeout)
        self.buffer = b""
        self.ended: Ended = "open"
        if self.receive_buffer is not None:
            # Before connect(): the window is announced in the handshake.
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.receive_buffer)
        try:
            self.socket.connect(("127.0.0.1", self.port))
        except BaseException:
            self.socket.close()
            raise

    def close(self) -> None:
        """Close in order."""
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.socket.close()

    def send(
        self,
        path: str,
        *,
        method: str = "GET",
        version: str = "1.1",
        close: bool = False,
        headers: Iterable[str] = (),
    ) -> None:
        """Send a request without waiting for the response."""
        lines = [f"{method} {path} HTTP/{version}", "Host: 127.0.0.1", *headers]
        if close:
            lines.append("Connection: close")
        if method == "POST":
            lines.append("Content-Length: 0")
        self.socket.sendall(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))

    def abort(self) -> None:
        """Close with a reset, as a client does that was killed."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def receive(self, method: str = "GET") -> Seen:
        """Read one response, as far as the server lets us."""
        seen = Seen()
        deadline = time.monotonic() + self.timeout
        while True:
            head = self._until(b"\r\n\r\n", deadline)
            if head is None:
                seen.ended, seen.raw_head = self.ended, self.buffer
                return seen
            self._parse_head(seen, head)
            assert seen.status is not None
            if seen.status >= 200:
                break
            seen.headers = []
        self._frame(seen, method)
        if seen.framing == "none":
            seen.whole = True
        elif seen.framing == "length":
            self._length(seen, int(seen.header("content-length") or 0), deadline)
        elif seen.framing == "chunked":
            self._chunked(seen, deadline)
        else:
            while self._more(deadline):
                pass
            seen.body, self.buffer = self.buffer, b""
            # A clean end of the stream is, by RFC 9112, section 6.3, the end of the body:
            # nothing tells it from a server that gave up. A reset tells.
            seen.whole = self.ended == "closed"
        seen.ended = self.ended
        return seen

    def wait_closed(self, seconds: float = 1.0) -> bool:
        """Return whether the server closes the connection within *seconds*."""
        deadline = time.monotonic() + seconds
        while self.ended == "open" and self._more(deadline):
            pass
        if self.ended == "timeout":
            self.ended = "open"
        return self.ended != "open"

    def _parse_head(self, seen: Seen, head: bytes) -> None:
        seen.raw_head = head
        first, *lines = head[:-4].decode("latin-1").split("\r\n")
        version, _, rest = first.partition(" ")
        assert version.startswith("HTTP/1."), first
        seen.status = int(rest[:3])
        for line in lines:
            name, colon, value = line.partition(":")
            assert colon, head
            seen.headers.append((name, value.strip()))

    def _frame(self, seen: Seen, method: str) -> None:
        if method == "HEAD" or seen.status in (204, 304):
            seen.framing = "none"
        elif (seen.header("transfer-encoding") or "").lower() == "chunked":
            seen.framing = "chunked"
        elif seen.header("content-length") is not None:
            seen.framing = "length"
        else:
            seen.framing = "close"

    def _length(self, seen: Seen, length: int, deadline: float) -> None:
        while len(self.buffer) < length and self._more(deadline):
            pass
        seen.body, self.buffer = self.buffer[:length], self.buffer[length:]
        seen.whole = len(seen.body) == length

    def _chunked(self, seen: Seen, deadline: float) -> None:
        blocks = []
        while (line := self._until(b"\r\n", deadline)) is not None:
            size = int(line.split(b";")[0], 16)
            while len(self.buffer) < size + 2 and self._more(deadline):
                pass
            blocks.append(self.buffer[:size])
            rest, self.buffer = self.buffer[size : size + 2], self.buffer[size + 2 :]
            if rest != b"\r\n":
                break
            if size == 0:
                seen.whole = True
                break
        seen.body = b"".join(blocks)

    def _until(self, mark: bytes, deadline: float) -> bytes | None:
        while mark not in self.buffer:
            if not self._more(deadline):
                return None
        end = self.buffer.index(mark) + len(mark)
        found, self.buffer = self.buffer[:end], self.buffer[end:]
        return found

    def _more(self, deadline: float) -> bool:
        if self.ended != "open":
            return False
        self.socket.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            data = self.socket.recv(65536)
        except TimeoutError:
            self.ended = "timeout"
            return False
        except ConnectionError:
            self.ended = "reset"
            return False
        if not data:
            self.ended = "closed"
            return False
        self.buffer += data
        return True


def fetch(
    port: int,
    path: str,
    *,
    method: str = "GET",
    version: str = "1.1",
    close: bool = False,
    timeout: float = 15.0,
) -> Seen:
    """Make one request on a connection of its own."""
    with Connection(port, timeout=timeout) as connection:
        connection.send(path, method=method, version=version, close=close)
        return connection.receive(method)
