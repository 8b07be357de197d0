"""A scope for the test itself, each time in a test run of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.testing.test_plugin import rows, run, shop

if TYPE_CHECKING:
    from sqlalchemy import URL

pytest_plugins = ["pytester"]

__all__ = ["shop"]  # a fixture


@pytest.fixture(params=["sqlite", "postgres"])
def any_shop(
    request: pytest.FixtureRequest, shop: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> pytest.Pytester:
    """The shop on each database."""
    if request.param == "postgres":
        url: URL = request.getfixturevalue("postgres_url")
        monkeypatch.setenv("SHOP_URL", url.render_as_string(hide_password=False))
    shop.makeconftest(
        """
        def pytest_unconfigure():
            import shop

            shop.engine.dispose()
        """
    )
    return shop


REQUEST = """
    from shop import Note, Session, app

    def post():
        response = app({"REQUEST_METHOD": "POST", "PATH_INFO": "/"}, lambda *_: None)
        body = list(response)
        response.close()
        return body

    def texts():
        return [note.text for note in Session.query(Note).order_by(Note.id)]
"""


def test_a_test_arranges_rows_and_looks_at_them(any_shop: pytest.Pytester) -> None:
    """It uses the registry as a request does, and commits before the request."""
    any_shop.makepyfile(requests=REQUEST)
    any_shop.makepyfile(
        """
        import pytest
        from requests import Note, Session, post, texts

        @pytest.mark.parametrize("number", [1, 2])
        def test_it(dbsession_scope, dbsession_isolation, number):
            Session.add(Note(text="arranged"))
            Session.commit()
            assert post() == [b"first", b"second"]
            assert texts() == ["arranged", "half"]
            assert dbsession_isolation[-1].outcome == "commit"
            assert dbsession_isolation[0].scope is dbsession_scope
            assert dbsession_scope.name == "dbsession_scope"
            Session.rollback()
            assert texts() == ["arranged", "half"]
        """
    )
    run(any_shop).assert_outcomes(passed=2)
    assert rows(any_shop) == 0


@pytest.mark.parametrize(
    "left",
    [
        pytest.param("Session.flush(); post()", id="flushed before a request"),
        pytest.param("post()", id="not even flushed"),
        pytest.param("Session.begin_nested(); post()", id="in a savepoint"),
        pytest.param("Session.add(Note(id=note.id)); fails(Session.flush)", id="failed flush"),
        pytest.param("fails(lambda: Session.execute(text('nonsense')))", id="failed statement"),
    ],
)
def test_what_a_test_leaves_in_its_scope_is_no_failure(
    any_shop: pytest.Pytester, left: str
) -> None:
    """It is rolled back, and so are the requests after it: nothing can look at them any more."""
    any_shop.makepyfile(requests=REQUEST)
    any_shop.makepyfile(
        f"""
        import pytest
        from requests import Note, Session, post, texts
        from sqlalchemy import text
        from wsgi_dbsession import NoScopeError

        def fails(work):
            with pytest.raises(Exception):
                work()

        def test_it(dbsession_scope):
            note = Note(text="committed")
            Session.add(note)
            Session.commit()
            Session.add(Note(text="left"))
            {left}

        def test_the_next_one(dbsession_isolation):
            with pytest.raises(NoScopeError):
                Session()
            assert post() == [b"first", b"second"]
            assert len(dbsession_isolation) == 1
        """
    )
    result = run(any_shop)
    result.assert_outcomes(passed=2)
    result.stdout.no_fnmatch_line("*has undone*")
    assert rows(any_shop) == 0


def test_a_rollback_within_the_test_is_reported(shop: pytest.Pytester) -> None:
    """There it does matter that it undoes the request."""
    shop.makepyfile(requests=REQUEST)
    shop.makepyfile(
        """
        from requests import Note, Session, post, texts

        def test_it(dbsession_scope):
            Session.add(Note(text="flushed, not committed"))
            Session.flush()
            post()
            Session.rollback()
            assert texts() == []
        """
    )
    result = run(shop)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_it*", "*has undone what*"])


def test_a_report_after_the_scope_of_the_test_is_not_lost(shop: pytest.Pytester) -> None:
    """A class-wide isolation goes on to look for undone commits."""
    shop.makepyfile(requests=REQUEST)
    shop.makepyfile(
        """
        import pytest
        from requests import Note, Session, post, texts
        from wsgi_dbsession import session_scope

        @pytest.mark.usefixtures("dbsession_class_isolation")
        class TestIt:
            def test_one(self, dbsession_scope):
                Session.add(Note(text="flushed"))
                Session.flush()
                post()

            def test_two(self):
                with session_scope(Session) as scope:
                    Session.add(Note(text="flushed"))
                    Session.flush()
                    post()
                    scope.doom()
        """
    )
    result = run(shop)
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of TestIt.test_two*", "*has undone what*"])


def test_rows_that_remain_fail_their_test_and_no_other(shop: pytest.Pytester) -> None:
    """The report is the one of the isolation."""
    shop.makepyfile(
        """
        from shop import Note, Session, add, notes

        def test_it(dbsession_scope):
            Session.add(Note(text="stays"))
            Session.flush()
            Session.connection().connection.commit()

        def test_the_next_one(dbsession_isolation):
            assert notes() == ["stays"]
        """
    )
    result = run(shop)
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_it*", "*remain in the database*"])
    assert rows(shop) == 1
