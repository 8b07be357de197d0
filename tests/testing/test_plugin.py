"""The plugin for pytest, each time in a test run of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import create_engine, func, select
from sqlalchemy.pool import NullPool

from tests.support.models import Base, Note

if TYPE_CHECKING:
    from sqlalchemy import URL

ROOT = Path(__file__).parents[2]

pytest_plugins = ["pytester"]

SHOP = """
    import os

    from sqlalchemy import create_engine
    from sqlalchemy.orm import scoped_session, sessionmaker

    from tests.support.models import Base, Note
    from wsgi_dbsession import SessionMiddleware, current_scope, session_scope

    engine = create_engine(os.environ["SHOP_URL"])
    Session = scoped_session(sessionmaker(engine), scopefunc=current_scope)


    def add(text):
        with session_scope(Session):
            Session.add(Note(text=text))


    def notes():
        with session_scope(Session):
            return [note.text for note in Session.query(Note).order_by(Note.id)]


    def app(environ, start_response):
        start_response("200 OK", [])
        Session.add(Note(text="half"))
        Session.flush()
        yield b"first"
        yield b"second"


    app = SessionMiddleware(app, Session)
"""

ONE_LINE = """
    [pytest]
    wsgi_dbsession_registries = shop:Session
"""


@pytest.fixture
def shop(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """An application with a SQLite file, and pytest configured by one line."""
    url = f"sqlite:///{pytester.path / 'shop.db'}"
    engine = create_engine(url)
    Base.metadata.create_all(engine)
    engine.dispose()
    monkeypatch.setenv("SHOP_URL", url)
    pytester.makepyfile(shop=SHOP)
    pytester.makeini(ONE_LINE)
    return pytester


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    options = ("-W", "error", "-p", "no:randomly")
    return pytester.runpytest_inprocess(*options, *arguments, plugins=[CloseShop()])


class CloseShop:
    """Closes the connections of an application that ends together with its test run."""

    def pytest_unconfigure(self) -> None:
        if "shop" in sys.modules:
            sys.modules["shop"].engine.dispose()


def rows(pytester: pytest.Pytester) -> int | None:
    engine = create_engine(f"sqlite:///{pytester.path / 'shop.db'}", poolclass=NullPool)
    with engine.connect() as connection:
        return connection.scalar(select(func.count(Note.id)))


def test_one_line_of_configuration_will_do(shop: pytest.Pytester) -> None:
    """Each test finds the database as the one before it did, and no row is left."""
    shop.makepyfile(
        """
        import pytest
        from shop import add, notes

        @pytest.mark.parametrize("number", [1, 2])
        def test_it(dbsession_isolation, number):
            assert notes() == []
            add("a")
            assert notes() == ["a"]
            assert dbsession_isolation[1].outcome == "commit"
        """
    )
    run(shop).assert_outcomes(passed=2)
    assert rows(shop) == 0


def test_classes_and_modules_are_isolated_as_a_whole(shop: pytest.Pytester) -> None:
    """What a fixture of theirs adds is there for each of their tests, and for no other."""
    shop.makepyfile(
        test_one="""
        import pytest
        from shop import add, notes

        @pytest.fixture(scope="module", autouse=True)
        def for_the_module(dbsession_module_isolation):
            add("module")

        @pytest.fixture(scope="class")
        def for_the_class(dbsession_class_isolation):
            add("class")

        @pytest.mark.usefixtures("for_the_class")
        class TestOne:
            def test_it_builds_up(self):
                assert notes() == ["module", "class"]
                add("test")

            def test_it_stands_on_the_one_before(self, dbsession_isolation):
                assert notes() == ["module", "class", "test"]
                add("isolated")

            def test_it_is_not_disturbed(self):
                assert notes() == ["module", "class", "test"]

        def test_the_class_is_over(dbsession_isolation):
            assert notes() == ["module"]
        """,
        test_two="""
        from shop import notes

        def test_the_module_is_over(dbsession_isolation):
            assert notes() == []
        """,
    )
    run(shop).assert_outcomes(passed=5)
    assert rows(shop) == 0


def test_outcomes_are_visible_without_isolation(shop: pytest.Pytester) -> None:
    """Then what is committed stays."""
    shop.makepyfile(
        """
        from shop import add

        def test_it(dbsession_outcomes):
            add("a")
            assert [each.reason for each in dbsession_outcomes] == ["complete"]
        """
    )
    run(shop).assert_outcomes(passed=1)
    assert rows(shop) == 1


def test_a_fixture_may_name_the_registries(shop: pytest.Pytester) -> None:
    """For an application whose registry is made by a function."""
    shop.makeini("[pytest]")
    shop.makepyfile(
        """
        import pytest
        import shop

        @pytest.fixture(scope="module")
        def session_registries():
            return [shop.Session]

        def test_it(dbsession_module_isolation, dbsession_outcomes):
            shop.add("a")
            assert len(dbsession_outcomes) == len(dbsession_module_isolation) == 1
        """
    )
    run(shop).assert_outcomes(passed=1)
    assert rows(shop) == 0


def test_a_fixture_may_return_a_single_registry(shop: pytest.Pytester) -> None:
    """Each of the plugin's fixtures accepts it."""
    shop.makeini("[pytest]")
    shop.makepyfile(
        """
        import pytest
        import shop

        @pytest.fixture(scope="session")
        def session_registries():
            return shop.Session

        def test_it(dbsession_module_isolation, dbsession_outcomes, dbsession_scope):
            shop.Session.add(shop.Note(text="a"))
            shop.Session.commit()
            assert len(dbsession_outcomes) == len(dbsession_module_isolation) == 1

        class TestOfAClass:
            def test_it(self, dbsession_class_isolation):
                shop.add("a")
        """
    )
    run(shop).assert_outcomes(passed=2)
    assert rows(shop) == 0


def test_a_fixture_that_returns_no_registry_is_explained(shop: pytest.Pytester) -> None:
    """Such as the extension of a framework, which has one."""
    shop.makeini("[pytest]")
    shop.makepyfile(
        """
        import pytest

        @pytest.fixture(scope="session")
        def session_registries():
            return object()

        def test_it(dbsession_isolation):
            pass
        """
    )
    result = run(shop)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*a session registry must be a scoped_session, got <object*"])


@pytest.mark.promise("constructors")
@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        pytest.param("", "must name the session registries to isolate", id="nothing"),
        pytest.param(
            "shop", "must name registries as package.module:name, got 'shop'", id="no name"
        ),
        pytest.param("shop:Sessions", "no attribute 'Sessions'", id="another name"),
        pytest.param("shops:Session", "No module named 'shops'", id="another module"),
    ],
)
def test_a_wrong_configuration_is_explained(
    shop: pytest.Pytester, line: str, complaint: str
) -> None:
    """With what to write instead."""
    shop.makeini(f"[pytest]\nwsgi_dbsession_registries = {line}")
    shop.makepyfile("def test_it(dbsession_isolation): pass")
    result = run(shop)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([f"*{complaint}*"])


@pytest.mark.promise("leaks")
def test_a_leak_fails_its_test_and_no_other(shop: pytest.Pytester) -> None:
    """The report names the line of the test, without a traceback of the plugin."""
    shop.makepyfile(
        """
        from shop import add, app, notes

        kept = []

        def test_it_leaks(dbsession_isolation):
            response = app({"REQUEST_METHOD": "GET", "PATH_INFO": "/feed"}, lambda *_: None)
            kept.append(response)
            next(response)

        def test_the_next_one(dbsession_isolation):
            add("a")
            assert notes() == ["a"]
        """
    )
    result = run(shop)
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_it_leaks*",
            "the scope of GET /feed was never ended. It was opened at *.py:6 in test_it_leaks.*",
        ]
    )
    result.stdout.no_fnmatch_line("*pytest_plugin.py*")
    assert rows(shop) == 0


LEAKS = """
    import pytest
    from shop import app

    kept = []

    @pytest.fixture
    def leaking(dbsession_{level}isolation):
        response = app({{"REQUEST_METHOD": "GET", "PATH_INFO": "/feed"}}, lambda *_: None)
        kept.append(response)
        next(response)

    @pytest.fixture
    def failing(leaking):
        assert not kept

    class TestIt:
        {mark}
        def test_it(self, leaking):
            {end}

        def test_the_last_one(self):
            pass
"""


@pytest.mark.parametrize("level", ["", "class_", "module_"])
def test_a_leak_of_a_failed_test_is_only_logged(shop: pytest.Pytester, level: str) -> None:
    """The leak is most likely a consequence of the failure."""
    shop.makepyfile(LEAKS.format(level=level, mark="", end="assert not kept"))
    result = run(shop, "--log-cli-level=ERROR")
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(["*the scope of GET /feed was never ended*"])


@pytest.mark.parametrize("level", ["", "class_", "module_"])
def test_a_leak_is_only_logged_if_a_later_fixture_has_failed(
    shop: pytest.Pytester, level: str
) -> None:
    """The error of the fixture is reported alone."""
    shop.makepyfile(
        LEAKS.format(level=level, mark="@pytest.mark.usefixtures('failing')", end="pass")
    )
    result = run(shop, "--log-cli-level=ERROR")
    result.assert_outcomes(errors=1, passed=1)
    result.stdout.fnmatch_lines(["*the scope of GET /feed was never ended*"])


@pytest.mark.parametrize(
    ("mark", "end", "outcome"),
    [
        ("@pytest.mark.xfail", "assert not kept", "xfailed"),
        ("", "pytest.skip()", "skipped"),
    ],
)
def test_a_leak_is_reported_unless_a_test_has_failed(
    shop: pytest.Pytester, mark: str, end: str, outcome: str
) -> None:
    """A test that was skipped, or that is expected to fail, hides no leak of its module."""
    shop.makepyfile(LEAKS.format(level="module_", mark=mark, end=end))
    result = run(shop)
    assert result.parseoutcomes()[outcome] == 1
    result.stdout.fnmatch_lines(["the scope of GET /feed was never ended*"])


def test_an_isolation_that_cannot_begin_fails_even_after_a_failure(shop: pytest.Pytester) -> None:
    """That of a module may begin late."""
    shop.makepyfile(
        """
        import pytest
        from shop import Session, notes, session_scope

        @pytest.fixture
        def scope():
            with session_scope(Session):
                Session.connection()
                yield

        def test_it_fails():
            assert 0

        def test_it(scope, request):
            request.getfixturevalue("dbsession_module_isolation")
        """
    )
    result = run(shop)
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["*outside of the isolation*"])


@pytest.mark.long
@pytest.mark.promise("nothing remains")
@pytest.mark.parametrize("database", ["one file for each worker", "one PostgreSQL for all"])
def test_workers_of_xdist_do_not_disturb_each_other(
    shop: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    postgres_url: URL,
    tmp_path: Path,
    database: str,
) -> None:
    """The isolation is that of the database; SQLite has one writer at a time."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # it may be of this run
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the shop takes its tables from these tests
    shared = database == "one PostgreSQL for all"
    if shared:
        monkeypatch.setenv("SHOP_URL", postgres_url.render_as_string(hide_password=False))
    else:
        monkeypatch.setenv("SHOP_URL", f"sqlite:///{tmp_path}/WORKER.db")
        shop.makeconftest(
            """
            import os

            if worker := os.environ.get("PYTEST_XDIST_WORKER"):
                os.environ["SHOP_URL"] = os.environ["SHOP_URL"].replace("WORKER", worker)
            """
        )
    shop.makepyfile(
        """
        import pytest
        from shop import Base, add, engine, notes

        @pytest.fixture(scope="session", autouse=True)
        def tables():
            Base.metadata.create_all(engine)

        @pytest.mark.parametrize("number", range(8))
        def test_it(dbsession_isolation, number):
            assert notes() == []
            for each in range(3):
                add(str(number))
            assert notes() == [str(number)] * 3
        """
    )
    result = shop.runpytest_subprocess("-W", "error", "-n", "2")
    result.assert_outcomes(passed=8)

    urls = [postgres_url] if shared else [f"sqlite:///{each}" for each in tmp_path.glob("gw*.db")]
    assert len(urls) == (1 if shared else 2)
    for url in urls:
        engine = create_engine(url, poolclass=NullPool)
        with engine.connect() as connection:
            assert connection.scalar(select(func.count(Note.id))) == 0
