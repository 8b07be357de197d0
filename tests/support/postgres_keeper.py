"""Keeps a PostgreSQL server for one test run: starts it, waits for the run's end, removes it.

Run as ``python -I -S postgres_keeper.py DIRECTORY INSTALLATION``; returns when the server answers.
A process of its own, in a session of its own, so that neither Ctrl-C nor the crash of a test
worker, nor even of the whole run, leaves a server behind: it waits for the lock on
``DIRECTORY/run.lock``, which the operating system takes from the run when that ends, however it
ends. Only the standard library is used, so that it starts quickly and is not measured.
"""

from __future__ import annotations

import fcntl
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SETTINGS = {
    "autovacuum": "off",
    "deadlock_timeout": "100ms",
    "fsync": "off",
    "full_page_writes": "off",
    "listen_addresses": "127.0.0.1",
    "max_connections": "300",
    "max_prepared_transactions": "64",
    "max_wal_senders": "0",
    "shared_buffers": "32MB",
    "synchronous_commit": "off",
    "wal_level": "minimal",
}


def main(directory: Path, installation: Path) -> int:
    """Fork the keeper off, and return when it has the server running or has given up."""
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        with open(reader, encoding="utf-8") as report:
            trouble = report.read()
        sys.stderr.write(trouble)
        return 1 if trouble else 0
    os.close(reader)
    os.setsid()
    with open(os.devnull, "r+b") as nothing:
        for descriptor in (0, 1, 2):
            os.dup2(nothing.fileno(), descriptor)
    try:
        keep(directory, installation, writer)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return 0


def keep(directory: Path, installation: Path, writer: int) -> None:
    """Start the server, report to ``writer``, and stop the server when the run has ended."""
    server: subprocess.Popen[bytes] | None = None
    with (directory / "run.lock").open() as lock:
        try:
            try:
                server = start(directory, installation)
            except Exception as error:
                log = directory / "log"
                text = log.read_text(errors="replace") if log.exists() else ""
                os.write(writer, f"PostgreSQL did not start: {error}\n{text[-20_000:]}".encode())
                return
            finally:
                os.close(writer)
            fcntl.flock(lock, fcntl.LOCK_EX)
        finally:
            if server is not None:
                stop(server)


def start(directory: Path, installation: Path) -> subprocess.Popen[bytes]:
    """Make a cluster in ``directory`` and start its server, as a user that PostgreSQL accepts."""
    identity: dict[str, Any] = {}
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        nobody = pwd.getpwnam("nobody")
        identity = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        os.chown(directory, nobody.pw_uid, nobody.pw_gid)
        if not all(path.stat().st_mode & 0o001 for path in installation.parents):
            installation = copy(installation, directory / "copy")

    data = directory / "data"
    # Clients find the message catalogue of the system's language otherwise.
    environ = {**os.environ, "LC_ALL": "C", "PGDATA": str(data)}
    with (directory / "log").open("wb") as log:
        subprocess.run(
            [
                installation / "bin" / "initdb",
                *("--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C"),
                *("--no-sync", "--no-instructions"),
            ],
            check=True,
            cwd=directory,
            env=environ,
            stdout=log,
            stderr=log,
            **identity,
        )
        for _ in range(5):
            port = free_port()
            settings = {**SETTINGS, "port": str(port), "unix_socket_directories": str(directory)}
            command: list[str | Path] = [installation / "bin" / "postgres"]
            for name, value in settings.items():
                command += ["-c", f"{name}={value}"]
            server = subprocess.Popen(
                command, cwd=directory, env=environ, stdout=log, stderr=log, **identity
            )
            if answers(server, data / "postmaster.pid"):
                # Renamed into place, so that no reader gets one half of it.
                draft = directory / "address.json.new"
                draft.write_text(json.dumps({"directory": str(directory), "port": port}))
                draft.rename(directory / "address.json")
                return server
            stop(server)  # another process may have been faster to take the port
    raise RuntimeError("five attempts failed")


def copy(installation: Path, target: Path) -> Path:
    """Copy the wheel's programs and libraries to where every user may read them."""
    package = installation.parent
    libraries = package.with_name(package.name + ".libs")
    if libraries.exists():
        shutil.copytree(libraries, target / libraries.name)
    return shutil.copytree(installation, target / package.name / installation.name, symlinks=True)


def free_port() -> int:
    """Return a TCP port that is free."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def answers(server: subprocess.Popen[bytes], postmaster_pid: Path) -> bool:
    """Wait until the server is ready for connections; false if it ends or takes too long."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and server.poll() is None:
        if postmaster_pid.exists() and postmaster_pid.read_text().rstrip().endswith("ready"):
            return True
        time.sleep(0.02)
    return False


def stop(server: subprocess.Popen[bytes]) -> None:
    """Stop the server: at once what is connected, for certain what hangs."""
    server.send_signal(signal.SIGINT)  # PostgreSQL's "fast shutdown"
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.send_signal(signal.SIGQUIT)
        server.wait()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
