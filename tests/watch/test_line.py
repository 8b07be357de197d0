"""The line of the application that asks for a connection."""

from __future__ import annotations

import sys
import sysconfig
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy

import wsgi_dbsession
from wsgi_dbsession.watch import _line
from wsgi_dbsession.watch._line import LineFinder, kind_of, show_line

if TYPE_CHECKING:
    from types import CodeType

PURELIB = Path(sysconfig.get_path("purelib"))
LIBRARY = str(PURELIB / "a_library" / "views.py")
OURS = str(Path(wsgi_dbsession.__file__).parent / "_middleware.py")
ORM = str(Path(sqlalchemy.__file__).parent / "orm" / "session.py")


@pytest.mark.parametrize(
    ("filename", "kind"),
    [
        pytest.param(OURS, _line.OURS, id="this package"),
        pytest.param(ORM, _line.SQLALCHEMY, id="SQLAlchemy"),
        pytest.param(LIBRARY, _line.LIBRARY, id="an installed library"),
        pytest.param("/usr/lib/python3/dist-packages/x.py", _line.LIBRARY, id="Debian's"),
        pytest.param(sysconfig.get_path("stdlib") + "/threading.py", _line.PYTHON, id="Python"),
        pytest.param("<string>", _line.PYTHON, id="generated code"),
        pytest.param("/srv/shop/views.py", _line.APPLICATION, id="the application"),
    ],
)
def test_a_file_belongs_to_someone(filename: str, kind: int) -> None:
    """The application is what remains."""
    assert kind_of(filename) == kind


def compiled(name: str, filename: str, body: str) -> CodeType:
    """Compile a function that stands in another file."""
    return compile(f"def {name}(inner):\n    return {body}", filename, "exec")


def call(chain: list[tuple[str, str]], innermost: Any) -> Any:
    """Call functions of these names and files, each from the one before it."""
    inner = innermost
    for name, filename in reversed(chain):
        namespace: dict[str, Any] = {}
        exec(compiled(name, filename, "inner()"), namespace)
        inner = partial(namespace[name], inner)  # which has no frame of its own
    return inner()


@pytest.mark.parametrize(
    ("chain", "found"),
    [
        pytest.param(
            [("view", "/srv/shop/views.py"), ("execute", ORM)],
            "/srv/shop/views.py:2 in view",
            id="the application called SQLAlchemy",
        ),
        pytest.param(
            [("view", "/srv/shop/views.py"), ("lazy", LIBRARY), ("execute", ORM)],
            "/srv/shop/views.py:2 in view",
            id="the application called a library that called SQLAlchemy",
        ),
        pytest.param(
            [("respond", OURS), ("view", LIBRARY), ("helper", LIBRARY), ("execute", ORM)],
            f"{LIBRARY}:2 in helper",
            id="the application is installed like a library",
        ),
        pytest.param(
            [("main", "/srv/run.py"), ("respond", OURS), ("view", LIBRARY), ("execute", ORM)],
            f"{LIBRARY}:2 in view",
            id="the script that starts the server is outside of the middleware",
        ),
    ],
)
def test_the_innermost_line_of_the_application_is_found(
    chain: list[tuple[str, str]], found: str
) -> None:
    """Again, too, when the finder knows how deep to look."""
    finder = LineFinder()
    for _ in range(3):
        assert show_line(call(chain, finder.find)) == found


def test_a_line_at_another_depth_is_found() -> None:
    """The finder looks where it found the last one, and then elsewhere."""
    finder = LineFinder()
    deep = [("view", "/srv/a.py"), ("execute", ORM), ("begin", ORM), ("connect", ORM)]
    flat = [("other", "/srv/b.py"), ("execute", ORM)]
    for _ in range(2):
        assert show_line(call(deep, finder.find)) == "/srv/a.py:2 in view"
        assert show_line(call(flat, finder.find)) == "/srv/b.py:2 in other"


def test_a_line_outside_of_the_application_is_unknown() -> None:
    """In a thread that Python runs for SQLAlchemy, for example."""
    namespace: dict[str, Any] = {}
    exec(compiled("run", ORM, "inner(None)"), namespace)

    line, _ = LineFinder().search(None)

    assert show_line(line) == "an unknown line"


def test_the_stack_may_be_less_deep_than_the_last_one() -> None:
    """Then it is searched."""
    finder = LineFinder()
    finder._depth = sys.getrecursionlimit()

    line = finder.find()

    assert show_line(line).endswith("in test_the_stack_may_be_less_deep_than_the_last_one")


def test_only_so_many_lines_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generated code may have any number; those are found by a search each time."""
    monkeypatch.setattr(_line, "_MOST", 1)
    finder = LineFinder()

    for name in ("one", "two", "two"):
        chain = [(name, f"/srv/{name}.py"), ("execute", ORM)]
        assert show_line(call(chain, finder.find)) == f"/srv/{name}.py:2 in {name}"

    assert len(finder._direct) == 1
