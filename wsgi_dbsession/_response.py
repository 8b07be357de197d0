"""The response step by step: the call of the application, its body, and its close."""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING, Any

from ._moment import Start
from ._start import END, close

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    from ._moment import Policy
    from ._scope import Scope

# What uWSGI's `wsgi.file_wrapper`, a C function, returns: the file that it was given.
_FILES = (io.BufferedReader, io.BufferedRandom, io.BytesIO, io.FileIO)


def respond(
    app: WSGIApplication,
    environ: WSGIEnvironment,
    start_response: StartResponse,
    scope: Scope,
    policy: Policy,
) -> Iterable[bytes]:
    """Make the first step of a request, the call of the application."""
    file_wrapper = environ.get("wsgi.file_wrapper")  # the application may change it
    start = Start(environ, start_response, scope, policy)
    result: Iterable[bytes] = ()
    try:
        try:
            scope.enter()
            result = app(environ, start)
            kind = type(result)
            if policy.commit_on == "close":
                return Response(start, result)
            # An exact list or tuple: a subclass may run code in `__iter__`, or have `close()`.
            finished = kind is list or kind is tuple or _is_file(result, file_wrapper)
            # A callable may choose "close" for a single response.
            if finished and (isinstance(policy.commit_on, str) or start.moment() != "close"):
                start.finish()
                return result
            result = Response(start, result)
            result.begin()
            return result
        except BaseException as error:
            if scope.environ is not None:  # otherwise the failure of the first block has closed it
                scope.close(error)
            raise
        finally:
            scope.leave()
    except BaseException as error:
        with contextlib.suppress(BaseException):  # the first error is the one to raise
            close(result)
        scope.close_sessions()  # an interruption may have skipped it
        if isinstance(error, Exception) and start.is_answerable():
            return start.answer()
        raise
    finally:
        # An error that the application caught may keep this frame alive in a cycle.
        result = ()


def _is_file(result: Iterable[bytes], file_wrapper: Any) -> bool:
    """Return whether the server sends a file, so that no application code is left to run."""
    if file_wrapper is None:
        return False
    try:
        return isinstance(result, file_wrapper)
    except TypeError:  # PEP 3333 asks for a callable, not for a class
        return type(result) in _FILES


class Response:
    """The body: the server iterates over it if application code is left to run."""

    __slots__ = ("_ahead", "_blocks", "_closed", "_complete", "_iterable", "_iterator", "_start")

    def __init__(self, start: Start, iterable: Iterable[bytes]) -> None:
        self._start = start
        self._iterable = iterable
        self._blocks: Iterator[bytes] | None = None
        self._ahead: bytes | None = None  # the first block, if the call has fetched it
        self._iterator: Iterator[bytes] | None = None
        self._complete = self._closed = False

    def begin(self) -> None:
        """Fetch the first block in the first step, the call of the application.

        The application may call ``start_response`` as late as here. But granian reads status and
        headers when the call returns, and cheroot answers with a 500 only if the call raises.
        """
        self._ahead = self._advance()

    def __iter__(self) -> Iterator[bytes]:
        start = self._start
        scope = start.scope
        block, self._ahead = self._ahead, None
        try:
            while block is not END:
                if block is not None:  # None: the call has not fetched the first
                    yield block
                    # The rest of a HEAD's body is never sent, and may be endless.
                    if self._closed or start.is_head:
                        return
                try:
                    scope.enter()
                    block = self._advance()
                finally:
                    scope.leave()
        except Exception:
            if not start.is_answerable():
                raise
            self._iterable = start.answer()
            yield from self._iterable

    def __next__(self) -> bytes:
        # Servers iterate, which is faster. A test or a middleware may call next().
        if self._iterator is None:
            self._iterator = iter(self)
        return next(self._iterator)

    def _advance(self) -> bytes:
        """Return the next block, or `END`, after an outcome if this is the moment."""
        start = self._start
        try:
            if self._blocks is None:
                self._blocks = iter(self._iterable)
            block: bytes = next(self._blocks, END)
            sent = start.sent
            if block is END:
                self._complete = True
                self._blocks = iter(())  # a further next() must not reach the application
            else:
                sent += len(block)
                self._complete = sent >= start.length()
            if self._complete or not start.released:
                start.proceed(complete=self._complete)
            start.sent = sent
        except BaseException as error:
            self._finish(error)
            raise
        return block

    def close(self) -> None:
        """Make the last step, which decides what is still undecided."""
        start = self._start
        self._ahead = self._iterator = None
        if self._closed:
            iterable, self._iterable = self._iterable, ()
            close(iterable)
            return
        # With commit_on="close": a server need not iterate over a body that it must not send.
        unsent = self._blocks is None and start.status is not None and start.length() == 0
        try:
            start.scope.enter()
            self._finish(complete=self._complete or unsent)
        finally:
            start.scope.leave()

    def __del__(self) -> None:
        # The collector may run this at any point: no application code, no context variable.
        if not self._closed:
            self._start.scope.drop()

    def _finish(self, error: BaseException | None = None, *, complete: bool = False) -> None:
        """Close the application's iterable, settle the rest and close the Sessions."""
        self._closed = True
        start, iterable = self._start, self._iterable
        self._iterable, self._blocks = (), iter(())
        try:
            close(iterable)
        except BaseException as failure:
            start.scope.close(error or failure)
            if error is None:
                raise
        else:
            start.scope.close(error, complete=complete, veto=start.vetoes)
