"""The servers of the suite, each with the command that its own documentation gives."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

from tests.support.sweeper import children

from .client import Seen, fetch

if TYPE_CHECKING:
    from collections.abc import Mapping

HERE = Path(__file__).parent
LIFE = 300  # seconds after which a server is ended, whatever the tests do


@dataclass(frozen=True)
class Server:
    """One server set-up: a row of the documentation's tables."""

    name: str
    command: str
    #: the distributions that it consists of, named with their versions in the documentation
    needs: tuple[str, ...] = ()
    #: modules that tell whether it can run here, where that is not clear from the distributions
    modules: tuple[str, ...] = ()
    #: programs from the system's packages
    programs: tuple[str, ...] = ()
    #: in what it works on many responses at once, if it does
    at_once: Literal["one", "threads", "greenlets", "event loop"] = "one"
    processes: int = 1
    #: a master process starts a new worker for one that was killed
    supervised: bool = False
    #: the application is imported, and uses its database, before the workers are forked
    preloaded: bool = False
    #: when it ends a body of unknown length in good order, though the application failed
    hides_errors: Literal["never", "after write()", "always"] = "never"
    #: it gives the application no `write()` (PEP 3333 asks for one)
    writes: bool = True
    #: what its log says when it answers with a 500 though the application was never called
    loses: str = ""

    def missing(self) -> str | None:
        """Return why the server cannot run here, or None."""
        if sys.platform != "linux":
            return "only on Linux can it be kept from outliving the tests"
        for name in self.needs:
            try:
                version(name)
            except PackageNotFoundError:
                return f"{name} is not installed"
        for module in self.modules:
            if importlib.util.find_spec(module) is None:
                return f"{self.needs[0]} {version(self.needs[0])} has no module {module}"
        for program in self.programs:
            if shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin") is None:
                return f"{program} is not installed (see .ci/packages)"
        return None


def _python(code: str) -> str:
    return "python -c " + repr(f"from application import application; {code}")


SERVERS = [
    Server(
        "wsgiref",
        _python(
            "from wsgiref.simple_server import make_server; "
            "make_server(HOST, PORT, application).serve_forever()"
        ),
    ),
    Server(
        "Werkzeug",
        _python(
            "from werkzeug.serving import run_simple; "
            "run_simple(HOST, PORT, application, threaded=True)"
        ),
        needs=("Werkzeug",),
        at_once="threads",
    ),
    Server(
        "gunicorn sync",
        "gunicorn --bind HOST:PORT application",
        needs=("gunicorn",),
        supervised=True,
    ),
    Server(
        "gunicorn gthread",
        "gunicorn --bind HOST:PORT --threads 64 application",
        needs=("gunicorn",),
        at_once="threads",
        supervised=True,
    ),
    Server(
        "gunicorn gevent",
        "gunicorn --bind HOST:PORT --worker-class gevent application",
        needs=("gunicorn", "gevent"),
        at_once="greenlets",
        supervised=True,
    ),
    Server(
        "gunicorn --preload",
        "gunicorn --bind HOST:PORT --preload --workers 2 --threads 64 application",
        needs=("gunicorn",),
        at_once="threads",
        processes=2,
        supervised=True,
        preloaded=True,
    ),
    Server(
        "gevent.pywsgi",
        "python -c "
        + repr(
            "from gevent import monkey; monkey.patch_all(); "
            "from gevent.pywsgi import WSGIServer; from application import application; "
            "WSGIServer((HOST, PORT), application).serve_forever()"
        ),
        needs=("gevent",),
        at_once="greenlets",
    ),
    Server(
        "waitress",
        "waitress-serve --listen=HOST:PORT --threads=8 application:application",
        needs=("waitress",),
        at_once="threads",
    ),
    Server(
        "cheroot",
        "cheroot --bind HOST:PORT --threads 64 application:application",
        needs=("cheroot",),
        at_once="threads",
    ),
    Server(
        "uWSGI",
        "uwsgi --http-socket HOST:PORT --master --die-on-term --module application:application",
        needs=("pyuwsgi",),
        supervised=True,
        preloaded=True,
    ),
    Server(
        "uWSGI threads",
        "uwsgi --http-socket HOST:PORT --master --die-on-term --module application:application "
        "--enable-threads --threads 64",
        needs=("pyuwsgi",),
        at_once="threads",
        supervised=True,
        preloaded=True,
    ),
    Server(
        "uWSGI preload",
        "uwsgi --http-socket HOST:PORT --master --die-on-term --module application:application "
        "--processes 2",
        needs=("pyuwsgi",),
        processes=2,
        supervised=True,
        preloaded=True,
    ),
    Server(
        "uWSGI http router",
        "uwsgi --http HOST:PORT --master --die-on-term --module application:application "
        "--enable-threads --threads 64",
        needs=("pyuwsgi",),
        at_once="threads",
        supervised=True,
        preloaded=True,
    ),
    Server(
        "granian",
        "granian --interface wsgi --host HOST --port PORT --blocking-threads 64 "
        "--respawn-failed-workers application:application",
        needs=("granian",),
        at_once="threads",
        supervised=True,
        hides_errors="always",
        writes=False,
    ),
    Server(
        "bjoern",
        _python("import bjoern; bjoern.run(application, HOST, PORT)"),
        needs=("bjoern",),
        at_once="event loop",
        writes=False,
    ),
    Server(
        "mod_wsgi",
        "mod_wsgi-express start-server --host HOST --port PORT --server-root ROOT --threads 64 "
        "--keep-alive-timeout 1 --log-to-terminal --application-type module application",
        needs=("mod_wsgi",),
        programs=("apache2",),
        at_once="threads",
        supervised=True,
        hides_errors="always",
    ),
    Server(
        "mod_wsgi embedded",
        "mod_wsgi-express start-server --embedded-mode --host HOST --port PORT "
        "--server-root ROOT --threads 64 --keep-alive-timeout 1 --log-to-terminal "
        "--application-type module application",
        needs=("mod_wsgi",),
        programs=("apache2",),
        at_once="threads",
        hides_errors="after write()",
        supervised=True,
    ),
    Server(
        "a2wsgi",
        _python(
            "import uvicorn; from a2wsgi import WSGIMiddleware; "
            "uvicorn.run(WSGIMiddleware(application, workers=64), host=HOST, port=PORT)"
        ),
        needs=("a2wsgi", "uvicorn"),
        at_once="threads",
    ),
    Server(
        "asgiref",
        _python(
            "import uvicorn; from asgiref.wsgi import WsgiToAsgi; "
            "uvicorn.run(WsgiToAsgi(application), host=HOST, port=PORT)"
        ),
        needs=("asgiref", "uvicorn"),
        at_once="one",
        writes=False,
        # https://github.com/django/asgiref/issues/491, here under many requests at once
        loses="CurrentThreadExecutor already quit or is broken",
    ),
    Server(
        "gunicorn eventlet",
        "gunicorn --bind HOST:PORT --worker-class eventlet application",
        needs=("gunicorn",),
        modules=("gunicorn.workers.geventlet",),
        at_once="greenlets",
        supervised=True,
    ),
]


def free_port() -> int:
    """Return a loopback port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Running:
    """A server that runs, until `stop`.

    :param extra: more options of its command line.
    :param place: the directory with the `application.py` that it serves.
    :param environ: more environment variables.
    :param life: seconds after which it is ended, whatever the tests do.
    """

    def __init__(
        self,
        server: Server,
        database_url: str,
        *extra: str,
        place: Path = HERE,
        environ: Mapping[str, str] | None = None,
        life: float = LIFE,
    ):
        self.server = server
        self.port = free_port()
        #: the name under which PostgreSQL knows its connections
        self.name = f"servers-{uuid.uuid4().hex[:12]}"
        self.root = Path(tempfile.mkdtemp(prefix="wsgi_dbsession-"))
        self._log: IO[bytes] = (self.root / "log").open("w+b")
        variables = {
            # A server that is killed leaves no usable measurement of the coverage.
            **{k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_")},
            "DATABASE_URL": database_url,
            "PGAPPNAME": self.name,
            "PYTHONPATH": os.pathsep.join([str(place), str(HERE.parent.parent)]),
            "HOME": str(self.root),  # gunicorn puts its control socket there
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            # The interpreter of the tests, and the commands installed beside it
            "PATH": os.pathsep.join(
                [str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin"]
            ),
            **(environ or {}),
        }
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "keeper.py"), str(life), *self._command(*extra)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            cwd=place,
            env=variables,
        )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def _command(self, *extra: str) -> list[str]:
        head, code, tail = self.server.command.partition(" -c ")
        words = [*head.split(), *extra]
        if code:
            words += ["-c", tail[1:-1].replace("HOST", "'127.0.0.1'")]
        words = [
            word.replace("HOST", "127.0.0.1")
            .replace("PORT", str(self.port))
            .replace("ROOT", str(self.root / "root"))
            for word in words
        ]
        if words[0] == "mod_wsgi-express" and os.geteuid() == 0:
            # Apache refuses to serve as root; and another user may not read what root installed.
            words = [
                *["setpriv", "--reuid", "www-data", "--regid", "www-data", "--clear-groups"],
                *["--inh-caps", "+dac_override", "--ambient-caps", "+dac_override"],
                # access() asks capabilities too: the checkout may be in a folder of root's own.
                *["--securebits", "+no_setuid_fixup"],
                *words,
            ]
            shutil.chown(self.root, "www-data", "www-data")
        return words

    def _wait(self) -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"{self.server.name} ended by itself:\n{self.log()}")
            try:
                if fetch(self.port, "/state", timeout=5).status == 200:
                    return
            except OSError:
                pass
            time.sleep(0.05)
        raise RuntimeError(f"{self.server.name} does not answer:\n{self.log()}")

    def fetch(
        self, path: str, *, method: str = "GET", version: str = "1.1", timeout: float = 15
    ) -> Seen:
        """Make one request on a connection of its own."""
        return fetch(self.port, path, method=method, version=version, timeout=timeout)

    def workers(self) -> list[int]:
        """Return the processes that answer requests, without the one that watches them."""
        servers = children(self._process.pid)
        if self.server.supervised:
            return [worker for pid in servers for worker in children(pid)]
        return servers

    def log(self) -> str:
        """Return what the server wrote to its standard output and error."""
        return (self.root / "log").read_text(errors="replace")

    def stop(self) -> None:
        """End the server and everything that it started."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        finally:
            self._process.kill()
            self._process.wait()
            self._log.close()
            shutil.rmtree(self.root, ignore_errors=True)
