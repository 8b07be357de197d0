"""Each promise has a test that breaks it on purpose, and the page says which."""

from __future__ import annotations

import pytest

from tests.support.promises import PAGE, complaints, marks, names, page, read


def test_each_promise_has_a_test() -> None:
    """And no test is for a promise that does not exist."""
    assert complaints(read()) == []


def test_the_page_is_what_the_marks_say() -> None:
    """``make docs-promises`` writes it anew."""
    assert PAGE.read_text() == page(read())


def test_a_name_stands_for_one_promise() -> None:
    """Tests name it without the part that it stands in."""
    assert len(names()) == len(set(names()))


@pytest.mark.parametrize(
    ("source", "found"),
    [
        pytest.param("def test_it(): pass", {"test_it": []}, id="none"),
        pytest.param(
            '@pytest.mark.long\n@pytest.mark.promise("a", "b")\ndef test_it(): pass',
            {"test_it": ["a", "b"]},
            id="a test",
        ),
        pytest.param('pytestmark = pytest.mark.promise("a")', {"": ["a"]}, id="a module"),
        pytest.param(
            'pytestmark = [pytest.mark.long, pytest.mark.promise("a")]', {"": ["a"]}, id="a list"
        ),
    ],
)
def test_marks_are_found(source: str, found: dict[str, list[str]]) -> None:
    """Wherever pytest finds them."""
    assert marks(source) == found


def test_what_is_missing_is_said() -> None:
    """A promise that lost its last test, and a mark with a slip of the pen."""
    tests = {name: ["test_it.py"] for name in names()[1:]} | {"dooom": ["test_that.py"]}

    assert complaints(tests) == [
        f"no test breaks {names()[0]!r}",
        "['test_that.py'] break 'dooom', which is none",
    ]
