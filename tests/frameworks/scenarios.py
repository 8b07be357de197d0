"""The requests that every framework's application gets, and how to tell what became of them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tests.frameworks.apps.database import Session
from tests.frameworks.server import Answer, Client

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import TypeAlias

    from _typeshed.wsgi import StartResponse, WSGIEnvironment

    from tests.frameworks.apps import Framework
    from tests.support.models import Database


Became: TypeAlias = Literal["committed", "rolled back"]


class Scenario(NamedTuple):
    """A request, and what must become of its writes."""

    title: str
    path: str
    becomes: Became
    text: str | None = None
    commit_error: bool = False
    blocks: int | None = None
    """After how many blocks the client goes away; None: never."""


ERRORS = (
    Scenario("unhandled exception", "/raise", "rolled back"),
    Scenario("error handler answers 409", "/refuse", "rolled back"),
    Scenario("error handler answers 200", "/apologise", "committed"),
    Scenario("the framework's own 403", "/abort", "rolled back"),
    Scenario("commit fails", "/books", "rolled back"),
    Scenario("commit fails, with `commit_error`", "/books", "rolled back", commit_error=True),
)
BODIES = (
    Scenario("redirect after POST", "/notes", "committed", text="new"),
    Scenario("file", "/download/end", "committed"),
    Scenario("file, commit fails", "/download/book", "rolled back"),
    Scenario("mounted application", "/mounted/end", "committed"),
    Scenario("mounted application, commit fails", "/mounted/book", "rolled back"),
)
STREAMS = (
    Scenario("whole", "/stream/end", "committed"),
    Scenario("error before the first block", "/stream/early", "rolled back"),
    Scenario("error after the second block", "/stream/raise", "rolled back"),
    Scenario("commit fails", "/stream/book", "rolled back"),
    Scenario("client leaves after the first block", "/stream/end", "rolled back", blocks=1),
)


def commit_failed(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Answer where the commit failed: a ``commit_error`` of the application's own."""
    start_response("503 Service Unavailable", [("Content-Type", "text/plain")])
    return [b"try again"]


@contextmanager
def bound(database: Database) -> Iterator[Database]:
    """Bind the application's Sessions to a database."""
    Session.session_factory.configure(bind=database.engine)
    try:
        yield database
    finally:
        Session.session_factory.configure(bind=None)


def make_client(framework: Framework, scenario: Scenario, **environ: Any) -> Client:
    """Make a framework's application, with the options that the scenario asks for."""
    app = framework.make_app(commit_error=commit_failed if scenario.commit_error else None)
    return Client(app, **environ)


def send(client: Client, scenario: Scenario) -> Answer:
    """Send a scenario's request."""
    form = {} if scenario.text is None else {"text": scenario.text}
    return client.send("POST", scenario.path, blocks=scenario.blocks, **form)


def describe(answer: Answer, notes: list[str]) -> str:
    """Say in a few words what the client got, and what became of the writes."""
    if answer.left:
        client = f"{answer.code}, left"
    elif answer.by_server:
        client = "500 by the server"
    elif answer.error is not None:
        client = f"{answer.code}, cut"
    else:
        client = str(answer.code)
    if answer.body in (b"joined", b"own"):
        client += f", {answer.body.decode()} scope"
    return f"{client}; {'committed' if notes else 'rolled back'}"
