"""Servers in processes of their own. ``python -m benchmarks.servers`` is a gevent.pywsgi one."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
GUNICORN = {
    "sync": ["--worker-class=sync"],
    "gthread": ["--worker-class=gthread", "--threads=8"],
    "gevent": ["--worker-class=gevent"],
}


class Server(NamedTuple):
    """A server that runs, and what it has said."""

    port: int
    log: IO[str]

    def last_words(self) -> str:
        """Return the last line of the log: of a traceback, the error."""
        self.log.seek(0)
        lines = [line.strip() for line in self.log if line.strip()]
        return lines[-1] if lines else "it does not say why"


@contextlib.contextmanager
def serve(
    worker: str, framework: str, peer: str, url: str, *, pool_size: int = 10
) -> Iterator[Server]:
    """Run an application in gunicorn with one worker, or in gevent.pywsgi."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environ = {
        **os.environ,
        "BENCHMARK_FRAMEWORK": framework,
        "BENCHMARK_PEER": peer,
        "BENCHMARK_URL": url,
        "BENCHMARK_POOL_SIZE": str(pool_size),
    }
    if worker == "pywsgi":
        command = [sys.executable, "-m", "benchmarks.servers", str(port)]
    else:
        command = [
            *(sys.executable, "-m", "gunicorn", f"--bind=127.0.0.1:{port}", "--workers=1"),
            *("--log-level=warning", "--no-control-socket", *GUNICORN[worker]),
            "benchmarks.applications.every:application_for_server()",
        ]
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            command, cwd=ROOT, env=environ, stdout=log, stderr=log, start_new_session=True
        )
        try:
            _wait_for(server, port)
            yield Server(port, log)
        except Exception as error:
            log.seek(0)
            msg = f"{peer} ({framework}) under {worker}: {error}\n{log.read()[-3000:]}"
            raise RuntimeError(msg) from error
        finally:
            # With the worker, and without a farewell to the clients that still read.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _wait_for(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError("the server ended")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as client:
            client.settimeout(60)
            client.sendall(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
            status = client.recv(100)
            if b" 200 " not in status:
                raise RuntimeError(f"the server answered {status!r}")
            return
        time.sleep(0.05)
    raise RuntimeError("the server does not answer")


def main(port: int) -> None:
    from gevent import monkey

    monkey.patch_all()

    from gevent.pywsgi import WSGIServer

    from benchmarks.applications.every import application_for_server

    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Loopback's own buffer swallows 2.5 MB: more than a network's, and no reader would be slow.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
    # Head and body are sent apart, and the second would wait 40 ms for a delayed acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(2048)
    listener.setblocking(False)
    WSGIServer(listener, application_for_server(), log=None).serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]))
