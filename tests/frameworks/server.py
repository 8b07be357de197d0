"""A server that keeps to PEP 3333, in process, and says what its client got.

WebTest alone would not do: it takes a second ``start_response`` for the first one though blocks
were sent, and raises what a server would turn into a 500 or into a body that is cut.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from webtest import TestApp
from webtest.lint import middleware as lint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from _typeshed import OptExcInfo
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment


@dataclass
class Answer:
    """What a client got."""

    status: str = ""
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
    whole: bool = False
    error: BaseException | None = None
    """What was raised into the server."""
    left: bool = False
    """Whether the client went away before the end."""

    @property
    def code(self) -> int:
        """The status code; 500 if the server had to answer for the application."""
        return int(self.status[:3])

    @property
    def by_server(self) -> bool:
        """Whether the application failed before anything was sent, and the server answered."""
        return self.error is not None and self.body == b"" and not self.whole


class Server:
    """Answers the requests of a WebTest client, and keeps the last answer.

    A body that is cut looks whole to WebTest: ask :attr:`answer`.
    """

    def __init__(self, app: WSGIApplication) -> None:
        self._app = lint(app)
        self.answer = Answer()
        self.blocks: int | None = None  # after how many the client goes away

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        answer = self.answer = Answer()
        try:
            self._run(environ, answer)
        except Exception as error:
            answer.error = error
            if not answer.body and not answer.whole:
                answer.status = "500 Internal Server Error"
                answer.headers = [("Content-Type", "text/plain")]
        # Short bodies would make WebTest raise.
        headers = [each for each in answer.headers if each[0].lower() != "content-length"]
        start_response(answer.status, headers)
        return [answer.body]

    def _run(self, environ: WSGIEnvironment, answer: Answer) -> None:
        def start(
            status: str, headers: list[tuple[str, str]], exc_info: OptExcInfo | None = None, /
        ) -> Callable[[bytes], None]:
            try:
                if exc_info is not None:
                    if answer.body and exc_info[1] is not None:
                        raise exc_info[1]
                elif answer.status:
                    raise AssertionError("start_response was called twice without exc_info")
            finally:
                exc_info = None
            answer.status, answer.headers = status, headers
            return write

        def write(block: bytes) -> None:
            answer.body += block

        blocks = self._app(environ, start)
        try:
            for number, block in enumerate(blocks, start=1):
                write(block)
                if number == self.blocks:
                    answer.left = True
                    return
            answer.whole = True
        finally:
            close: Callable[[], None] | None = getattr(blocks, "close", None)
            if close is not None:
                close()


class Client(TestApp):  # type: ignore[misc,unused-ignore]
    """A WebTest client that takes every status, and tells how the answer came about."""

    __test__ = False

    def __init__(self, app: WSGIApplication, **environ: Any) -> None:
        self.server = Server(app)
        super().__init__(self.server, extra_environ={"SERVER_PROTOCOL": "HTTP/1.1", **environ})

    def send(self, method: str, path: str, blocks: int | None = None, **form: str) -> Answer:
        """Make a request and return what the client got, that goes away after some blocks."""
        self.server.blocks = blocks
        if method == "GET":
            self.get(path, expect_errors=True)
        else:
            self.post(path, params=form, expect_errors=True)
        return self.server.answer
