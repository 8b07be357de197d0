"""A plugin for pytest: isolation as fixtures. It is found by itself, through its entry point.

One line of configuration says which registries to isolate::

    [tool.pytest.ini_options]
    wsgi_dbsession_registries = ["myapp.database:Session"]
"""

from __future__ import annotations

import contextlib
import importlib
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import pytest

from wsgi_dbsession.testing._isolation import isolate
from wsgi_dbsession.testing._outcomes import Recorded, record_outcomes

if TYPE_CHECKING:
    from collections.abc import Generator

    from sqlalchemy.orm import scoped_session

_OPTION = "wsgi_dbsession_registries"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that names the registries."""
    parser.addini(
        _OPTION,
        "the session registries to isolate, each as package.module:name",
        type="linelist",
    )


@pytest.fixture(scope="session")
def session_registries(pytestconfig: pytest.Config) -> tuple[scoped_session[Any], ...]:
    """The registries to isolate: those of the option, or override this fixture."""
    names: list[str] = pytestconfig.getini(_OPTION)
    if not names:
        pytest.fail(
            f"which session registries are to be isolated? Write `{_OPTION} = "
            "myapp.database:Session` into pytest's configuration, or override the fixture "
            "`session_registries`",
            pytrace=False,
        )
    return tuple(_find(name) for name in names)


def _find(name: str) -> scoped_session[Any]:
    module, _, attribute = name.partition(":")
    try:
        found: scoped_session[Any] = attrgetter(attribute)(importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        pytest.fail(
            f"{_OPTION} names {name!r}, which cannot be found: {error}. "
            "It is package.module:name, and tests must be able to import it",
            pytrace=False,
        )
    return found


@contextlib.contextmanager
def _isolate(registries: tuple[scoped_session[Any], ...]) -> Generator[list[Recorded]]:
    problem = None
    try:
        with isolate(*registries) as outcomes:
            yield outcomes
    except RuntimeError as error:
        problem = error
    if problem is not None:
        pytest.fail(str(problem), pytrace=False)


@pytest.fixture
def isolation(
    session_registries: tuple[scoped_session[Any], ...],
) -> Generator[list[Recorded]]:
    """Undo what the test does; the value is what became of the test's scopes."""
    with _isolate(session_registries) as outcomes:
        yield outcomes


@pytest.fixture(scope="class")
def class_isolation(
    session_registries: tuple[scoped_session[Any], ...],
) -> Generator[list[Recorded]]:
    """Undo what the tests of a class do together."""
    with _isolate(session_registries) as outcomes:
        yield outcomes


@pytest.fixture(scope="module")
def module_isolation(
    session_registries: tuple[scoped_session[Any], ...],
) -> Generator[list[Recorded]]:
    """Undo what the tests of a module do together."""
    with _isolate(session_registries) as outcomes:
        yield outcomes


@pytest.fixture
def outcomes(
    session_registries: tuple[scoped_session[Any], ...],
) -> Generator[list[Recorded]]:
    """What becomes of the test's scopes, isolated or not."""
    with record_outcomes(*session_registries) as outcomes:
        yield outcomes
