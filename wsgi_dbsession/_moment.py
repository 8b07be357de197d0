"""*When*: the moments of a response, and the outcome that comes at one of them.

The rule: no client gets a whole, successful response whose transaction did not commit. So the
outcome comes as late as possible while a failure can still reach the client, and the response's
start is held until the outcome is known or a block has to be sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from ._start import HeldStart, body_length

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import TypeAlias

    from _typeshed import OptExcInfo
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    from ._scope import Scope
    from ._start import Headers

Moment: TypeAlias = Literal["complete", "headers", "close"]
CommitOn: TypeAlias = (
    "Moment | Literal['auto'] | Callable[[WSGIEnvironment, str, Headers], Moment]"
)
CommitVeto: TypeAlias = "Callable[[WSGIEnvironment, str, Headers], bool]"

MOMENTS: tuple[str, ...] = get_args(Moment)

_NO_START = (
    "the application has not called start_response, though its body has begun or ended, see "
    '"The start_response() Callable" in PEP 3333'
)


@dataclass(frozen=True, slots=True)
class Policy:
    """What an application chose for all of its responses."""

    commit_on: CommitOn
    commit_veto: CommitVeto | None
    commit_error: WSGIApplication | None


def choose_moment(environ: WSGIEnvironment, status: str, headers: Headers) -> Moment:
    """Return the moment for "auto": Server-Sent Events must not hold a connection."""
    for name, value in headers:
        if name.lower() == "content-type" and value.lower().startswith("text/event-stream"):
            return "headers"
    return "complete"


class Start(HeldStart):
    """The held start of a response, and the moments of its scope."""

    __slots__ = ("_length", "_moment", "environ", "failure", "is_head", "policy", "scope", "sent")

    def __init__(
        self,
        environ: WSGIEnvironment,
        start_response: StartResponse,
        scope: Scope,
        policy: Policy,
    ) -> None:
        self.status = self._exc_info = None
        self.released = False
        self._server = start_response
        self.environ = environ
        self.scope = scope
        self.policy = policy
        # Read now: an application that changes the method must not move the moment.
        self.is_head = environ.get("REQUEST_METHOD") == "HEAD"
        self.sent = 0  # bytes of the body
        self.failure: BaseException | None = None
        self._length: float | None = None
        self._moment: Moment | None = None

    def __call__(
        self, status: str, headers: Headers, exc_info: OptExcInfo | None = None, /
    ) -> Callable[[bytes], object]:
        """Keep the start, see "The start_response() Callable" in PEP 3333."""
        kind: type = type(status)  # callers without a type checker may pass anything
        if not issubclass(kind, str):
            msg = f"status must be a str, got {status!r}, see PEP 3333, A Note On String Types"
            raise TypeError(msg)
        if self.status is not None:
            if exc_info is None:
                # The application has failed, and may swallow this error too (a debugger).
                msg = (
                    "start_response was called a second time without exc_info, see "
                    '"The start_response() Callable" in PEP 3333'
                )
                self.scope.doom()
                self.failure = AssertionError(msg)
                raise self.failure
            self._length = self._moment = None
        self.status = status
        self.headers = headers
        self._exc_info = exc_info
        if self.released or self.policy.commit_on == "close":
            self.released = False
            self.release()
        return self.write

    def release(self) -> None:
        """Pass the start to the server, once. Call it before each block.

        :raises AssertionError: there is no start, though the body has begun.
        :raises BaseException: the outcome failed, and the application swallowed the error.
        """
        if self.status is None:
            raise AssertionError(_NO_START)
        if self.failure is not None and self.status[:1] not in "45":
            raise self.failure
        if not self.released:
            self._pass_on()

    def write(self, block: bytes, /) -> None:
        """Send a block at once: the write callable of PEP 3333."""
        if self.length() == 0 and self.moment() == "complete":
            return  # with the headers the client has all of it, so they wait for the outcome
        self.proceed(complete=self.sent + len(block) >= self.length())
        self.sent += len(block)
        self._write(block)

    def length(self) -> float:
        """Return the number of bytes that make the body whole, see :func:`body_length`.

        :raises AssertionError: the application has not called ``start_response``.
        """
        if self._length is None:
            if self.status is None:
                raise AssertionError(_NO_START)
            self._length = body_length(self.is_head, self.status, self.headers)
        return self._length

    def moment(self) -> Moment:
        """Return when the outcome of this response comes.

        :raises AssertionError: the application has not called ``start_response``.
        :raises ValueError: ``commit_on`` returned something else.
        """
        moment = self._moment
        if moment is None:
            choice: Any = self.policy.commit_on
            if callable(choice):
                if self.status is None:
                    raise AssertionError(_NO_START)
                choice = choice(self.environ, self.status, self.headers)
                if choice not in MOMENTS:
                    msg = f"commit_on must return one of {MOMENTS}, got {choice!r}"
                    raise ValueError(msg)
            chosen: Moment = choice
            self._moment = moment = chosen
        return moment

    def proceed(self, *, complete: bool) -> None:
        """Settle the scope if this is the moment, and release the start, before a block is sent.

        :param complete: whether the body is whole with this block, or exhausted.
        """
        scope = self.scope
        if scope.undecided():
            self._settle_if_due(complete=complete)
        released = self.released
        self.release()
        # An outer middleware's start_response may have used a Session.
        if not released and scope.undecided():
            self._settle_if_due(complete=complete)

    def _settle_if_due(self, *, complete: bool) -> None:
        moment = self.moment()
        if moment != "close" and (complete or (moment == "headers" and not self.released)):
            try:
                self.scope.settle(veto=self.vetoes, final=complete)
            except BaseException as failure:
                self.failure = failure
                self.scope.doom()  # the application may swallow what write() raises
                raise

    def vetoes(self) -> str:
        """Return why the response vetoes the commit, or an empty string.

        :raises AssertionError: the application has not called ``start_response``.
        """
        if self.status is None:
            raise AssertionError(_NO_START)
        veto = self.policy.commit_veto
        if veto is not None and veto(self.environ, self.status, self.headers):
            return f"status {self.status[:3]}"
        return ""

    def finish(self) -> None:
        """Settle and release a response whose body is finished, and close the scope."""
        if self.scope.undecided():
            self._settle_if_due(complete=True)
        self.release()
        # It settles what an outer middleware's start_response has written.
        self.scope.close(veto=self.vetoes)

    def is_answerable(self) -> bool:
        """Return whether ``commit_error`` can still answer: nothing of the body was sent."""
        asked = self.policy.commit_error is not None
        return asked and self.scope.failure is not None and not self.sent

    def answer(self) -> Iterable[bytes]:
        """Let ``commit_error`` answer. Call it in an ``except`` block, outside of any step."""
        assert self.policy.commit_error is not None
        return self.policy.commit_error(self.environ, self._restart)

    def _restart(
        self, status: str, headers: Headers, exc_info: OptExcInfo | None = None, /
    ) -> Callable[[bytes], object]:
        failure = self.scope.failure
        if status[:1] not in "45":
            msg = f"commit_error must answer with status 4xx or 5xx, got {status!r}"
            raise ValueError(msg) from failure
        if exc_info is None and self.released and failure is not None:
            # The server has a start, with headers that it has not sent: they can be replaced.
            # A raised error has the traceback that the annotation requires.
            exc_info = (type(failure), failure, failure.__traceback__)  # type: ignore[assignment]
        if exc_info is None:
            return self._server(status, headers)
        self.released = True
        return self._server(status, headers, exc_info)
