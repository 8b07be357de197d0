"""*When*: the response step by step, and the moment of the outcome.

The rule: no client gets a whole, successful response whose transaction did not commit. So the
outcome comes at the last moment at which its failure still shows, and the response's start is
held until the outcome is known or a block has to be handed on.
"""

from __future__ import annotations

import contextlib
import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ._scope import describe
from ._transaction import is_unknown, log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import TypeAlias

    from _typeshed import OptExcInfo
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    from ._scope import Scope

CommitOn: TypeAlias = Literal["complete", "headers", "close"]
CommitVeto: TypeAlias = "Callable[[WSGIEnvironment, str, list[tuple[str, str]]], bool]"

_END: Any = object()  # stands for a block where there is none left

# What uWSGI's `wsgi.file_wrapper`, a C function, returns: the file that it was given.
_FILES = (io.BufferedReader, io.BufferedRandom, io.BytesIO, io.FileIO)


@dataclass(frozen=True, slots=True)
class Policy:
    """What an application chose for all of its responses."""

    commit_on: CommitOn
    commit_veto: CommitVeto | None
    commit_error: WSGIApplication | None


def respond(
    app: WSGIApplication,
    environ: WSGIEnvironment,
    start_response: StartResponse,
    scope: Scope,
    policy: Policy,
) -> Iterable[bytes]:
    """Make the first step of a request, the call of the application."""
    start = Start(environ, start_response, scope, policy)
    result: Iterable[bytes] = ()
    try:
        scope.enter()
        try:
            result = app(environ, start)
            if policy.commit_on == "close":
                return Response(start, result)
            if _is_finished(result, environ):
                start.end()
                start.release()
            else:
                result = Response(start, result)
                result.begin()
        except BaseException as error:
            start.end(error)
            raise
        finally:
            scope.leave()
    except BaseException as error:
        with contextlib.suppress(BaseException):  # a file; the first error is the one to raise
            _close(result)
        if isinstance(error, Exception) and start.is_answerable():
            return start.answer()
        raise
    try:
        return result
    finally:
        # An error that the application caught may live on in a cycle, and this frame with it.
        del result


def _is_finished(result: Iterable[bytes], environ: WSGIEnvironment) -> bool:
    """Say whether no application code is left to run, so that the server may get the object.

    Only for an exact list or tuple: a subclass may run code in ``__iter__``, or have ``close()``.
    """
    kind = type(result)
    if kind is list or kind is tuple:
        return True
    file_wrapper = environ.get("wsgi.file_wrapper")
    if file_wrapper is None:
        return False
    try:
        return isinstance(result, file_wrapper)
    except TypeError:  # PEP 3333 asks for a callable, not for a class
        return kind in _FILES


def _close(iterable: Iterable[bytes]) -> None:
    close = getattr(iterable, "close", None)
    if close is not None:
        close()


class Start:
    """The response's start: the ``start_response`` of the application, held for the server.

    It does not know the body: a generator holds on to the ``start_response`` it was given, and a
    way from here back to it would keep an abandoned response alive until a collection.
    """

    __slots__ = (
        "_exc_info",
        "_headers",
        "_server",
        "_write",
        "environ",
        "failure",
        "length",
        "policy",
        "released",
        "scope",
        "sent",
        "status",
    )

    def __init__(
        self,
        environ: WSGIEnvironment,
        start_response: StartResponse,
        scope: Scope,
        policy: Policy,
    ) -> None:
        self.environ = environ
        self.scope = scope
        self.policy = policy
        self.status: str | None = None
        self.length: float | None = None  # bytes that make the body whole, once measured
        self.sent = 0  # bytes of the body that were handed on
        self.released = False
        self.failure: BaseException | None = None  # of the commit
        self._server = start_response

    def __call__(
        self, status: str, headers: list[tuple[str, str]], exc_info: OptExcInfo | None = None, /
    ) -> Callable[[bytes], object]:
        """Take the application's word, see "The start_response() Callable" in PEP 3333."""
        if self.status is not None and exc_info is None:
            # Who wants to start anew has failed, and may catch this error too (a debugger).
            self.scope.doom()
            msg = (
                "start_response was called a second time without exc_info, see "
                '"The start_response() Callable" in PEP 3333'
            )
            raise AssertionError(msg)
        self.status = status
        self.length = None
        self._headers = headers
        self._exc_info = exc_info
        if self.released or self.policy.commit_on == "close":
            self.released = False
            self.release()
        return self.write

    def release(self) -> None:
        """Hand the start on to the server, if that has not been done; call it before every block.

        :raises AssertionError: there is none, though the body has begun.
        """
        if self.status is None:
            raise AssertionError(_NO_START)
        if self.failure is not None and self.status[:1] not in "45":
            # The application caught the error out of write() and calls it a success.
            raise self.failure
        if self.released:
            return
        self.released = True
        exc_info, self._exc_info = self._exc_info, None
        if exc_info is None:
            self._write = self._server(self.status, self._headers)
            return
        try:
            self._write = self._server(self.status, self._headers, exc_info)
        finally:
            exc_info = None  # a traceback that refers to this frame is a cycle

    def write(self, block: bytes, /) -> None:
        """Hand a block on at once, as the write callable of PEP 3333 does."""
        complete = self.completes(block)
        if complete and self.is_held_to_the_end():
            return
        self.settle_if_due(complete=complete)
        self.release()
        self.sent += len(block)
        self._write(block)

    def measure(self) -> float:
        """Return the number of bytes that make the body whole: infinite if that is unknown.

        It is 0 where the headers alone are the whole response: HEAD, 1xx, 204, 304
        (RFC 9110, section 6.4.1).

        :raises AssertionError: the application has not called ``start_response``.
        """
        if self.length is None:
            status = self.status
            if status is None:
                raise AssertionError(_NO_START)
            self.length = math.inf
            if status.startswith(("1", "204", "304")) or (
                self.environ.get("REQUEST_METHOD") == "HEAD"
            ):
                self.length = 0
            else:
                for name, value in self._headers:
                    if name.lower() == "content-length" and value.strip().isdecimal():
                        self.length = int(value)
        return self.length

    def completes(self, block: bytes) -> bool:
        """Say whether the body is whole with this block."""
        return self.sent + len(block) >= self.measure()

    def is_held_to_the_end(self) -> bool:
        """Say whether no block may be handed on before the outcome.

        With the headers of a response without a body, the client has all of it.
        """
        return self.length == 0 and self.policy.commit_on == "complete"

    def settle_if_due(self, *, complete: bool) -> None:
        """Settle the scope if this is the moment, before a block is handed on or at exhaustion.

        :param complete: whether the body is whole with this block, or exhausted.
        """
        commit_on = self.policy.commit_on
        due = complete or (commit_on == "headers" and not self.released)
        if due and commit_on != "close" and self.scope.undecided():
            try:
                self.scope.settle(veto=self.vetoes)
            except BaseException as failure:
                self._note(failure)
                raise

    def vetoes(self) -> bool:
        """Ask the veto.

        :raises AssertionError: the application has not called ``start_response``.
        """
        if self.status is None:
            raise AssertionError(_NO_START)
        veto = self.policy.commit_veto
        return veto is not None and veto(self.environ, self.status, self._headers)

    def end(self, error: BaseException | None = None, *, complete: bool = True) -> None:
        """End the scope, see :meth:`Scope.end`."""
        try:
            self.scope.end(error, complete=complete, veto=self.vetoes)
        except BaseException as failure:
            self._note(failure)
            raise

    def _note(self, failure: BaseException) -> None:
        if self.scope.reason == "commit failed":
            self.failure = failure
            self.scope.doom()  # the application may catch it, out of write()
            retry = self.environ.get("wsgi_dbsession.retry")
            if retry is None or not retry.will_retry(self.scope, failure):
                what = (
                    "the connection broke during the commit, nobody knows if it took place"
                    if is_unknown(failure)
                    else "the commit failed, everything is rolled back"
                )
                log.error("%s: %s: %s", describe(self.environ), what, failure, exc_info=failure)

    def is_answerable(self) -> bool:
        """Say whether ``commit_error`` can still answer: nothing of the body was handed on."""
        asked = self.policy.commit_error is not None
        return asked and self.failure is not None and not self.sent

    def answer(self) -> Iterable[bytes]:
        """Let ``commit_error`` answer. Call it while the failure is handled, in no step."""
        assert self.policy.commit_error is not None
        return self.policy.commit_error(self.environ, self._restart)

    def _restart(
        self, status: str, headers: list[tuple[str, str]], exc_info: OptExcInfo | None = None, /
    ) -> Callable[[bytes], object]:
        failure = self.failure
        if exc_info is None and self.released and failure is not None:
            # The server has a start, with headers that it has not sent: they can be replaced.
            # The annotation wants a traceback; an error that was raised has one.
            exc_info = (type(failure), failure, failure.__traceback__)  # type: ignore[assignment]
        if exc_info is None:
            return self._server(status, headers)
        self.released = True
        return self._server(status, headers, exc_info)


_NO_START = (
    "the application has not called start_response, though its body has begun or ended, see "
    '"The start_response() Callable" in PEP 3333'
)


class Response:
    """The body: the iterable that the server gets where application code is left to run."""

    __slots__ = ("_ahead", "_blocks", "_closed", "_complete", "_iterable", "_start")

    def __init__(self, start: Start, iterable: Iterable[bytes]) -> None:
        self._start = start
        self._iterable = iterable
        self._blocks: Iterator[bytes] | None = None
        self._ahead: bytes | None = None  # what the call of the application has got already
        self._complete = False
        self._closed = False

    def begin(self) -> None:
        """Get the first block in the step that is the call of the application.

        The application may call ``start_response`` as late as here, but granian takes status and
        headers when the call returns, and cheroot answers an error with a 500 only if it comes
        out of the call.
        """
        self._ahead = self._get()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        block, self._ahead = self._ahead, None
        if block is None:
            if self._closed:  # nothing is left, or the answer of `commit_error`
                assert self._blocks is not None
                return next(self._blocks)
            start = self._start
            try:
                start.scope.enter()
                try:
                    block = self._get()
                finally:
                    start.scope.leave()
            except Exception:
                if not start.is_answerable():
                    raise
                self._iterable = start.answer()
                self._blocks = iter(self._iterable)
                return next(self._blocks)
        if block is _END:
            raise StopIteration
        return block

    def _get(self) -> bytes:
        """Return the next block, or `_END`, after an outcome if this is the moment. In a step."""
        start = self._start
        try:
            if self._blocks is None:
                self._blocks = iter(self._iterable)
            block: bytes = next(self._blocks, _END)
            if block is _END:
                self._complete = True
            elif not self._complete:
                self._complete = start.completes(block)
                if self._complete and start.is_held_to_the_end():
                    for _ in self._blocks:
                        pass
            start.settle_if_due(complete=self._complete)
            start.release()
            if block is not _END:
                start.sent += len(block)
        except BaseException as error:
            self._finish(error)
            raise
        return block

    def close(self) -> None:
        """Make the last step: what is undecided is decided now."""
        start = self._start
        # With commit_on="close": a server need not iterate over a body that it must not send.
        unsent = self._blocks is None and start.status is not None and start.measure() == 0
        self._make_last_step(complete=self._complete or unsent)

    def __del__(self) -> None:
        if not self._closed:  # the server forgot close(): what is undecided is rolled back
            self._make_last_step(complete=False)

    def _make_last_step(self, *, complete: bool) -> None:
        self._ahead = None
        if self._closed:
            iterable, self._iterable = self._iterable, ()
            _close(iterable)
            return
        scope = self._start.scope
        scope.enter()
        try:
            self._finish(complete=complete)
        finally:
            scope.leave()

    def _finish(self, error: BaseException | None = None, *, complete: bool = False) -> None:
        """Close the application's iterable, settle the rest and remove the Sessions."""
        self._closed = True
        iterable, self._iterable, self._blocks = self._iterable, (), iter(())
        try:
            _close(iterable)
        except BaseException as failure:
            if error is not None:
                self._start.end(error)
                return
            self._start.end(failure)
            raise
        self._start.end(error, complete=complete)
