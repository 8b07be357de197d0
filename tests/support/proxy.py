"""A network between a client and its database, that delays, counts, breaks and loses.

:class:`Proxy` copies what a client and a PostgreSQL, PgBouncer, MySQL or MariaDB server send each
other, message by message. It runs in threads of the test's own process, with plain sockets: use it
where gevent has not patched them.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from typing import TYPE_CHECKING, Literal

from typing_extensions import Self

from tests.support.wire import MySQL, PostgreSQL

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import URL

    from tests.support.wire import Wire

WIRES: dict[str, type[Wire]] = {"postgresql": PostgreSQL, "mysql": MySQL, "mariadb": MySQL}
At = Literal["never", "before", "after"]
Way = queue.SimpleQueue[tuple[float, bytes]]


class Proxy:
    """Listens on a port of 127.0.0.1, and passes on what comes to a server on another port.

    :param host: Where the server listens.
    :param port: Its port.
    :param protocol: ``"postgresql"`` or ``"mysql"``.
    :param delay: How many seconds each block takes, in each direction. May be changed.
    """

    def __init__(
        self, host: str, port: int, protocol: str = "postgresql", *, delay: float = 0
    ) -> None:
        self.upstream = (host, port)
        self.delay = delay
        self.host = "127.0.0.1"
        self.lock = threading.Lock()
        self.lose: At = "never"
        self.lost = threading.Event()
        self._wire = WIRES[protocol]
        self._links: list[Link] = []
        self._listener: socket.socket | None = None
        self.port = 0
        self.connections = 0
        self._before = (0, 0, 0)
        self.listen()

    @classmethod
    def to(cls, url: URL, *, delay: float = 0) -> Self:
        """Make a proxy to the server of an SQLAlchemy URL."""
        assert url.host is not None
        protocol = url.get_backend_name()
        port = url.port or (5432 if protocol == "postgresql" else 3306)
        return cls(url.host, port, protocol, delay=delay)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def url(self, url: URL) -> URL:
        """Return the URL with the proxy in the server's place."""
        return url.set(host=self.host, port=self.port)

    # -- counting ---------------------------------------------------------------------------------

    def round_trips(self) -> int:
        """Return how often a client sent something and waited for its answer, since the reset.

        Logging in is not counted. Requests that were sent together count once.
        """
        return self._count(0)

    def sent(self) -> int:
        """Return how many messages the clients sent, since the reset."""
        return self._count(1)

    def received(self) -> int:
        """Return how many messages the server sent, since the reset."""
        return self._count(2)

    def reset(self) -> None:
        """Begin to count at 0."""
        self._before = (0, 0, 0)
        self._before = (self._count(0), self._count(1), self._count(2))

    def _count(self, index: int) -> int:
        with self.lock:
            wires = [link.wire for link in self._links]
            unreadable = [wire.unreadable for wire in wires if wire.unreadable]
            assert not unreadable, f"the proxy can not count: {unreadable[0]}"
            counts = ((wire.round_trips, wire.sent, wire.received)[index] for wire in wires)
            return sum(counts) - self._before[index]

    # -- breaking ---------------------------------------------------------------------------------

    def listen(self) -> None:
        """Accept connections, again after :meth:`refuse`; the port stays the same."""
        if self._listener is None:
            self._listener = socket.create_server((self.host, self.port))
            self.port = self._listener.getsockname()[1]
            threading.Thread(target=self._accept, args=[self._listener], daemon=True).start()

    def refuse(self) -> None:
        """Refuse new connections; the existing ones go on."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread up that accepts
            listener.close()

    def cut(self) -> int:
        """Break all connections, on both sides, and return how many there were."""
        with self.lock:
            alive = [link for link in self._links if not link.broken.is_set()]
        for link in alive:
            link.cut()
        return len(alive)

    def eat_commit_answer(self) -> threading.Event:
        """Lose the answer to the next COMMIT that takes place, then break its connection.

        The transaction is committed; its client can not know. A COMMIT that the server refuses is
        not the next one.

        :return: An event that is set when it has happened.
        """
        return self._lose("after")

    def eat_commit(self) -> threading.Event:
        """Lose the next COMMIT on its way to the server, then break its connection.

        The transaction is rolled back; its client can not know. PostgreSQL's COMMIT counts when it
        is sent, or parsed, as text.

        :return: An event that is set when it has happened.
        """
        return self._lose("before")

    def _lose(self, at: At) -> threading.Event:
        with self.lock:
            self.lose, self.lost = at, threading.Event()
            return self.lost

    def close(self) -> None:
        """Refuse new connections, break the others, and wait for the threads."""
        self.refuse()
        self.cut()
        for link in list(self._links):
            link.join()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self.upstream, timeout=10)
                server.settimeout(None)
            except OSError:
                client.close()
                continue
            with self.lock:
                self.connections += 1
                self._links.append(Link(self, client, server, self._wire()))
            self._links[-1].start()


class Link:
    """One client's connection: two sockets, and for each direction a reader and a writer."""

    def __init__(
        self, proxy: Proxy, client: socket.socket, server: socket.socket, wire: Wire
    ) -> None:
        self.wire = wire
        self.broken = threading.Event()
        self._proxy = proxy
        self._sockets = (client, server)
        # What is on its way to the server and to the client, and when it arrives.
        self._ways: tuple[Way, Way] = (queue.SimpleQueue(), queue.SimpleQueue())
        self._threads = [
            threading.Thread(target=self._run, args=[target, index], daemon=True)
            for index in (0, 1)
            for target in (self._read, self._write)
        ]
        self._running = len(self._threads)
        for each in self._sockets:
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(10)

    def cut(self) -> None:
        """End both connections, without a word and without what is still on its way."""
        self.broken.set()
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for way in self._ways:
            way.put((0, b""))

    def _run(self, target: Callable[[int], None], index: int) -> None:
        with contextlib.suppress(OSError):
            target(index)
        with self._proxy.lock:
            self._running -= 1
            last = not self._running
        if last:
            # Not earlier: the descriptor could be another socket's while a thread still uses it.
            for each in self._sockets:
                each.close()

    def _read(self, index: int) -> None:
        source, way = self._sockets[index], self._ways[index]
        look = self.wire.from_client if index == 0 else self.wire.from_server
        loses: At = "before" if index == 0 else "after"
        try:
            while block := source.recv(1 << 16):
                with self._proxy.lock:
                    lost = look(block) and self._proxy.lose == loses
                    if lost:
                        self._proxy.lose = "never"
                if lost:
                    self.cut()
                    self._proxy.lost.set()
                    return
                way.put((time.monotonic() + self._proxy.delay, block))
        finally:
            way.put((0, b""))

    def _write(self, index: int) -> None:
        sink, way = self._sockets[1 - index], self._ways[index]
        try:
            while not self.broken.is_set():
                due, block = way.get()
                if not block:
                    break
                if (wait := due - time.monotonic()) > 0:
                    self.broken.wait(wait)
                sink.sendall(block)
        finally:
            # One side has closed its connection, and everything it sent has arrived.
            self.cut()
