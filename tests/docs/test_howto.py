"""How-to pages that a code block alone cannot prove: the page's code in real programs."""

from __future__ import annotations

import shutil
import socket
import sqlite3
import sys
import time
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from simple_websocket import Client, ConnectionClosed

from tests.docs.pages import blocks, run, serving, unused_port

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin")
CUT = """
def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    yield b"first"
    raise RuntimeError("in the middle")
"""


def notes(folder: Path, name: str = "app.db") -> list[str]:
    with closing(sqlite3.connect(folder / name)) as connection:
        return [text for (text,) in connection.execute("SELECT text FROM note ORDER BY rowid")]


def gunicorn(folder: Path) -> tuple[list[str], int]:
    """Return a command that serves ``app.py``, and its port."""
    port = unused_port()
    # Not below the home directory, which a sandbox may not let it write to.
    options = ["--bind", f"127.0.0.1:{port}", "--threads", "8", "--worker-tmp-dir", str(folder)]
    return [sys.executable, "-m", "gunicorn", *options, "app:app"], port


def flask_run(folder: Path) -> tuple[list[str], int]:
    """The same with Werkzeug's server."""
    port = unused_port()
    return [sys.executable, "-m", "flask", "run", "--port", str(port)], port


@pytest.mark.servers
@pytest.mark.parametrize(
    ("server", "kept"),
    [
        pytest.param(gunicorn, [], id="gunicorn rolls back the scope of the request"),
        pytest.param(flask_run, ["on the request"], id="Werkzeug commits it"),
    ],
)
def test_each_message_of_a_websocket_is_committed(
    server: Callable[[Path], tuple[list[str], int]], kept: list[str], tmp_path: Path
) -> None:
    """A message is saved before its answer; what is added outside of a block may be lost."""
    outside = """
@sock.route("/outside")
def outside(ws):
    Session.add(Note(text=ws.receive()))
    ws.send("heard")
"""
    (code,) = blocks("docs/websockets.md")
    (tmp_path / "app.py").write_text(code + outside)

    with serving(tmp_path, *server(tmp_path)) as address:
        client = Client(f"ws://{address}/notes")
        client.send("one")
        assert client.receive(60) == "1 saved"
        assert notes(tmp_path) == ["one"]
        client.send("two")
        assert client.receive(60) == "2 saved"
        assert notes(tmp_path) == ["one", "two"]
        client.close()
        client = Client(f"ws://{address}/outside")
        client.send("on the request")
        assert client.receive(60) == "heard"
        with pytest.raises(ConnectionClosed):
            client.receive(60)
        deadline = time.monotonic() + 60
        while kept and notes(tmp_path)[2:] != kept and time.monotonic() < deadline:
            time.sleep(0.05)
    # The server has ended, so the request has.
    assert notes(tmp_path) == ["one", "two", *kept]


@pytest.mark.servers
@pytest.mark.skipif(NGINX is None, reason="NOT RUN: nginx is not installed")
def test_nginx_cuts_a_cut_stream_only_with_the_setting_of_the_page(tmp_path: Path) -> None:
    """By default it speaks HTTP/1.0 to the server, and sends a last chunk that never was there."""
    assert NGINX is not None
    (tmp_path / "app.py").write_text(CUT)
    (location,) = blocks("docs/deployment.md", "nginx")
    command, upstream = gunicorn(tmp_path)
    location = location.replace("127.0.0.1:8000", f"127.0.0.1:{upstream}")
    default = f"location /default {{ proxy_pass http://127.0.0.1:{upstream}; }}"
    port = unused_port()
    temporary = "".join(
        f"{kind}_temp_path {tmp_path}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {tmp_path}/nginx.pid; error_log stderr;"
        f"events {{}} http {{ access_log off; {temporary}"
        f"server {{ listen 127.0.0.1:{port}; {location} {default} }} }}"
    )
    proxy = [NGINX, "-c", str(tmp_path / "nginx.conf"), "-e", "stderr"]

    with serving(tmp_path, command, upstream), serving(tmp_path, proxy, port):
        seen = {path: fetch(port, path) for path in ("/", "/default")}

    assert seen["/"].endswith(b"\r\n5\r\nfirst\r\n")
    assert seen["/default"].endswith(b"\r\n5\r\nfirst\r\n0\r\n\r\n")


def fetch(port: int, path: str) -> bytes:
    """Return the whole answer as it comes over the wire."""
    request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(request.encode())
        return b"".join(iter(lambda: client.recv(1 << 16), b""))


def test_alembic_runs_the_migration_of_the_page(tmp_path: Path) -> None:
    """The blocks of the page go where it says: into env.py, and into a version."""
    models, migration = blocks("docs/alembic.md", "py")
    (set_up, *_) = blocks("docs/start.md")
    (tmp_path / "app.py").write_text(set_up)
    run(tmp_path, "alembic", "init", "migrations")
    env = tmp_path / "migrations" / "env.py"
    text = env.read_text()
    assert "target_metadata = None" in text
    env.write_text(text.replace("target_metadata = None", models))
    ini = tmp_path / "alembic.ini"
    ini.write_text(
        ini.read_text().replace("driver://user:pass@localhost/dbname", "sqlite:///app.db")
    )
    (tmp_path / "migrations" / "versions" / "1_trim.py").write_text(
        f'revision = "1"\ndown_revision = None\n\n{migration}\n\ndef downgrade():\n    pass\n'
    )
    run(tmp_path, "alembic", "current")  # imports app.py, which makes its tables
    with closing(sqlite3.connect(tmp_path / "app.db")) as connection:
        connection.execute("INSERT INTO note (text) VALUES ('  wide  ')")
        connection.commit()

    run(tmp_path, "alembic", "upgrade", "head")

    assert notes(tmp_path) == ["wide"]
    assert "No new upgrade operations" in run(tmp_path, "alembic", "check")


def test_flask_shell_commits_what_is_committed_at_the_prompt(tmp_path: Path) -> None:
    """The lines of the page, typed into ``flask shell``; what follows is not committed."""
    (code, *_) = blocks("docs/shells.md")
    (tmp_path / "app.py").write_text(code)
    (session,) = blocks("docs/shells.md", "console")
    typed = [line[4:] for line in session.splitlines() if line.startswith(">>> ")]
    assert len(typed) == 3

    output = run(
        tmp_path, "flask", "shell", words="\n".join([*typed, "Session.add(Note(text='x'))", ""])
    )

    assert "['typed']" in output
    assert notes(tmp_path) == ["typed"]


def test_a_python_prompt_commits_what_is_committed_there(tmp_path: Path) -> None:
    """The same in a plain interpreter."""
    (code, *_) = blocks("docs/shells.md")
    (tmp_path / "app.py").write_text(code)
    (session,) = blocks("docs/shells.md", "pycon")
    typed = [line[4:] for line in session.splitlines()]

    run(tmp_path, "code", words="\n".join([*typed, "Session.add(Note(text='lost'))", ""]))

    assert notes(tmp_path) == ["typed"]


def test_a_long_job_keeps_its_finished_batches(tmp_path: Path) -> None:
    """A failure in the third batch loses that one only, as docs/scripts.md says."""
    set_up, _, batches, *_ = blocks("docs/scripts.md")
    failing = batches.replace('{"text": f"note {number}"}', '{"text": 1 / (7 - number)}')
    (tmp_path / "job.py").write_text(f"{set_up}\n{failing}")

    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run(tmp_path, "job")

    assert len(notes(tmp_path)) == 1 + 6
