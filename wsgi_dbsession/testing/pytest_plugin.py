"""A pytest plugin: isolation as fixtures. pytest loads it through its entry point.

One line of configuration names the registries to isolate::

    [tool.pytest.ini_options]
    wsgi_dbsession_registries = ["myapp.database:Session"]
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.orm import scoped_session

from wsgi_dbsession._report import log
from wsgi_dbsession.testing._isolation import Isolation, open_isolation
from wsgi_dbsession.testing._outcomes import Recorded, record_outcomes

if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import TypeAlias

    from wsgi_dbsession._scope import Scope

_Registries: TypeAlias = "Iterable[scoped_session[Any]] | scoped_session[Any]"

_OPTION = "wsgi_dbsession_registries"

# Whether a test, or any test of a class or module, has failed.
_FAILED = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that names the registries."""
    parser.addini(
        _OPTION,
        "the session registries to isolate, each as package.module:name",
        type="linelist",
    )


# The outermost wrapper, because other plugins may turn a failure into an expected one.
@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    """Record that a test has failed, for the end of its isolations."""
    found = yield
    report: pytest.TestReport = found.get_result()
    if report.when == "setup":
        item.stash[_FAILED] = False  # it may run again
    if report.when != "teardown" and report.failed:
        for node in item.listchain():
            node.stash[_FAILED] = True


@pytest.fixture(scope="session")
def session_registries(pytestconfig: pytest.Config) -> tuple[scoped_session[Any], ...]:
    """Return the registries to isolate, from the option; override this fixture to choose others.

    An overriding fixture may return a single registry.
    """
    names: list[str] = pytestconfig.getini(_OPTION)
    if not names:
        pytest.fail(
            f"{_OPTION} must name the session registries to isolate, got nothing: write "
            f"`{_OPTION} = myapp.database:Session` into pytest's configuration, or override the "
            "fixture `session_registries`",
            pytrace=False,
        )
    return tuple(_find(name) for name in names)


def _find(name: str) -> scoped_session[Any]:
    module, _, attribute = name.partition(":")
    try:
        found: scoped_session[Any] = attrgetter(attribute)(importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        pytest.fail(
            f"{_OPTION} must name registries as package.module:name, got {name!r}: {error}. "
            "Make the module importable for the tests",
            pytrace=False,
        )
    return found


def _as_tuple(registries: _Registries) -> tuple[scoped_session[Any], ...]:
    # A scoped_session is iterable, like its Session. adopt() raises for other objects.
    kind: type = type(registries)  # a fixture may return anything
    given: Any = registries
    single = issubclass(kind, scoped_session) or not issubclass(kind, Iterable)
    return (given,) if single else tuple(given)


@contextlib.contextmanager
def _isolate(registries: _Registries, request: pytest.FixtureRequest) -> Generator[Isolation]:
    problem = None
    opened = False
    try:
        with open_isolation(_as_tuple(registries)) as isolation:
            opened = True
            yield isolation
    except RuntimeError as error:
        problem = error
    if problem is not None:
        untyped: Any = request  # FixtureRequest.node has no annotation
        if opened and untyped.node.stash.get(_FAILED, False):
            log.error("%s", problem)  # most likely a consequence of that failure
        else:
            pytest.fail(str(problem), pytrace=False)


@pytest.fixture
def _dbsession_isolation(
    session_registries: _Registries, request: pytest.FixtureRequest
) -> Generator[Isolation]:
    with _isolate(session_registries, request) as isolation:
        yield isolation


@pytest.fixture
def dbsession_isolation(_dbsession_isolation: Isolation) -> list[Recorded]:
    """Roll back what the test does, and return the list of its scopes' outcomes."""
    return _dbsession_isolation.outcomes


@pytest.fixture(scope="class")
def dbsession_class_isolation(
    session_registries: _Registries, request: pytest.FixtureRequest
) -> Generator[list[Recorded]]:
    """Roll back what the tests of a class do together."""
    with _isolate(session_registries, request) as isolation:
        yield isolation.outcomes


@pytest.fixture(scope="module")
def dbsession_module_isolation(
    session_registries: _Registries, request: pytest.FixtureRequest
) -> Generator[list[Recorded]]:
    """Roll back what the tests of a module do together."""
    with _isolate(session_registries, request) as isolation:
        yield isolation.outcomes


@pytest.fixture
def dbsession_outcomes(
    session_registries: _Registries,
) -> Generator[list[Recorded]]:
    """Record the outcomes of the test's scopes, isolated or not."""
    with record_outcomes(*_as_tuple(session_registries)) as outcomes:
        yield outcomes


@pytest.fixture
def dbsession_scope(
    _dbsession_isolation: Isolation, session_registries: _Registries
) -> Generator[Scope]:
    """Open a scope for the test itself, in the isolation of ``dbsession_isolation``.

    The test can use the registries like a request. Requests read what the test has committed.
    """
    with _dbsession_isolation.open_scope(_as_tuple(session_registries)) as scope:
        yield scope
