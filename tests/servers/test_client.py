"""The client that judges the servers is judged by bytes that it cannot misread."""

from __future__ import annotations

import socket
import struct
import threading

import pytest

from .client import Seen, fetch


def serve(raw: bytes, *, reset: bool = False, method: str = "GET") -> Seen:
    """Answer one request with these bytes, and return what the client makes of them."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(raw)
                if reset:
                    connection.recv(0)
                    linger = struct.pack("ii", 1, 0)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            return fetch(listener.getsockname()[1], "/", method=method, timeout=5)
        finally:
            thread.join()


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("raw", "framing", "kind", "body"),
    [
        pytest.param(
            OK + b"Content-Length: 5\r\n\r\nwhole", "length", "200", b"whole", id="length met"
        ),
        pytest.param(
            OK + b"content-length: 6\r\n\r\nshort",
            "length",
            "200, cut",
            b"short",
            id="length missed",
        ),
        pytest.param(
            OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
            "chunked",
            "200",
            b"abc",
            id="last chunk seen",
        ),
        pytest.param(
            OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
            "chunked",
            "200, cut",
            b"abc",
            id="last chunk missing",
        ),
        pytest.param(
            OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nab",
            "chunked",
            "200, cut",
            b"ab",
            id="chunk broken off",
        ),
        pytest.param(OK + b"\r\nrest", "close", "200", b"rest", id="ended by closing"),
        pytest.param(b"", "close", "no answer", b"", id="nothing"),
        pytest.param(b"HTTP/1.1 200 O", "close", "no answer", b"", id="half a head"),
        pytest.param(
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
            "none",
            "204",
            b"",
            id="an interim response first",
        ),
    ],
)
def test_the_client_tells_whole_from_cut(raw: bytes, framing: str, kind: str, body: bytes) -> None:
    """Content-Length, chunks and the end of the connection are what they are in RFC 9112."""
    seen = serve(raw)
    assert (seen.framing, seen.kind, seen.body) == (framing, kind, body)


def test_a_head_is_whole_with_its_headers() -> None:
    """The Content-Length of a HEAD announces nothing."""
    assert serve(OK + b"Content-Length: 5\r\n\r\n", method="HEAD").kind == "200"


def test_a_reset_is_no_end() -> None:
    """A body that ends by closing is not whole if the connection is reset."""
    assert not serve(OK + b"\r\nrest", reset=True).success
