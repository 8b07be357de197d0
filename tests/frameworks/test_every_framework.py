"""One application, eight frameworks: what the middleware promises holds in each of them."""

from __future__ import annotations

from contextvars import copy_context
from typing import TYPE_CHECKING, Any
from wsgiref.util import FileWrapper

import pytest
import webtest
from sqlalchemy.exc import IntegrityError
from webtest.lint import middleware as lint

from tests.frameworks.apps import FRAMEWORKS, Framework
from tests.frameworks.scenarios import (
    Scenario,
    commit_failed,
    describe,
    make_client,
    send,
)
from tests.frameworks.server import Client
from tests.frameworks.tables import DOCUMENT, GROUPS, read

if TYPE_CHECKING:
    from contextvars import Context

    from _typeshed.wsgi import WSGIApplication

    from tests.support.models import Database

pytestmark = pytest.mark.promise("frameworks")

every_framework = pytest.mark.parametrize(
    "framework", [pytest.param(each, id=each.name) for each in FRAMEWORKS]
)


every_scenario = pytest.mark.parametrize(
    ("group", "scenario"),
    [
        pytest.param(group, scenario, id=f"{group}: {scenario.title}")
        for group, scenarios in GROUPS.items()
        for scenario in scenarios
    ],
)


@pytest.mark.promise("no false success")
@every_framework
@every_scenario
def test_no_whole_success_without_a_commit(
    framework: Framework, group: str, scenario: Scenario, shop: Database
) -> None:
    """The writes are committed or rolled back as told, the client can tell, the document tells.

    Where only the document is wrong, after an update of the framework,
    ``python -m tests.frameworks`` writes its tables anew.
    """
    client = make_client(framework, scenario)

    answer = send(client, scenario)

    notes = shop.notes()
    assert bool(notes) == (scenario.becomes == "committed")
    assert (answer.whole and answer.code < 400) == (scenario.becomes == "committed")
    assert describe(answer, notes) == read_cell(group, framework.name, scenario)

    client.send("POST", "/notes", text="the next request")
    assert client.get("/notes").text.endswith("the next request\n")


def read_cell(group: str, framework: str, scenario: Scenario) -> str:
    """Return what docs/frameworks.md says of this."""
    rows = {row[0]: row[1:] for row in read(DOCUMENT.read_text(encoding="utf-8"), group)}
    return rows[framework][GROUPS[group].index(scenario)]


@every_framework
def test_a_redirect_leads_to_what_was_written(framework: Framework, shop: Database) -> None:
    """The page after the redirect, another request, shows the new note."""
    response = Client(framework.make_app()).post("/notes", {"text": "seen"})

    assert response.follow().text == "seen\n"


@every_framework
@pytest.mark.parametrize("ending", ["end", "book"])
def test_the_servers_file_wrapper_changes_nothing(
    framework: Framework, ending: str, shop: Database
) -> None:
    """A file that the server sends itself is committed first, or not sent."""
    client = Client(framework.make_app(), **{"wsgi.file_wrapper": FileWrapper})

    answer = client.send("POST", f"/download/{ending}")

    assert answer.body == (b"The quarterly report.\n" if ending == "end" else b"")
    assert shop.notes() == (["download"] if ending == "end" else [])


@every_framework
@pytest.mark.parametrize("commit_on", ["headers", "close"])
@pytest.mark.parametrize("path", ["/download/end", "/stream/end", "/mounted/end"])
def test_every_moment_commits_all_of_it(
    framework: Framework, commit_on: str, path: str, shop: Database
) -> None:
    """Whenever the outcome comes, nothing that a successful response wrote is lost."""
    client = Client(framework.make_app(commit_on=commit_on))

    answer = client.send("POST", path)

    assert answer.whole
    assert shop.notes() == (["one", "two"] if path == "/stream/end" else [path.split("/")[1]])


@every_framework
def test_commit_error_does_not_answer_where_the_body_has_begun(
    framework: Framework, shop: Database
) -> None:
    """A stream whose commit fails is cut: it is too late for another answer."""
    client = Client(framework.make_app(commit_error=commit_failed))

    answer = client.send("POST", "/stream/book")

    assert (answer.code, answer.whole) == (200, False)
    assert shop.notes() == []


@every_framework
def test_a_step_that_fails_leaves_the_other_request_alone(
    framework: Framework, postgres_shop: Database
) -> None:
    """Of two streams that a server interleaves, each in its own context, one may fail."""
    app = framework.make_app()
    failing, sound = Stream(app, "/stream/raise"), Stream(app, "/stream/end")

    assert [failing.step(), sound.step(), failing.step(), sound.step()] == [
        "one",
        "one",
        "two",
        "two",
    ]
    with pytest.raises(RuntimeError, match="in mid-stream"):
        failing.step()
    failing.close()
    assert sound.step() == ""
    sound.close()

    assert postgres_shop.notes() == ["one", "two"]


@pytest.mark.parametrize(
    "framework",
    # Flask's stream_with_context cannot do this, see test_flask.py.
    [pytest.param(each, id=each.name) for each in FRAMEWORKS if each.name != "Flask"],
)
def test_streams_that_share_a_thread_and_a_context_keep_apart(
    framework: Framework, postgres_shop: Database
) -> None:
    """A server with one thread that interleaves responses is no danger to the Sessions."""
    app = framework.make_app()
    context = copy_context()
    streams = [Stream(app, "/stream/end", context), Stream(app, "/stream/book", context)]

    assert [each.step() for each in streams * 2] == ["one", "one", "two", "two"]
    assert streams[0].step() == ""
    with pytest.raises(IntegrityError):
        streams[1].step()
    for each in streams:
        each.close()

    assert postgres_shop.notes() == ["one", "two"]


class Stream:
    """A response whose steps the test makes one by one."""

    def __init__(self, app: WSGIApplication, path: str, context: Context | None = None) -> None:
        self._context = copy_context() if context is None else context
        environ = webtest.TestRequest.blank(path, POST={}).environ
        self._response = self._context.run(lint(app), environ, self._start)
        self._blocks = self._context.run(iter, self._response)

    def _start(self, status: str, headers: object, exc_info: Any = None) -> Any:
        if exc_info is not None:
            raise exc_info[1]
        return lambda block: None

    def step(self) -> str:
        """Return the last word of the next block; at the end of the body, an empty string."""
        block: bytes = self._context.run(next, self._blocks, b"")
        return "".join(block.decode().split()[-1:])

    def close(self) -> None:
        self._context.run(self._response.close)
