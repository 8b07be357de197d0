"""``session_scope``: a unit of work outside of requests, or inside of one."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from ._registry import adopt, check_routed, observers_of
from ._scope import Scope

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from sqlalchemy.orm import scoped_session

P = ParamSpec("P")
R = TypeVar("R")


class session_scope:  # noqa: N801 - used like contextlib's context managers
    """An independent scope, in a request or outside: ``with session_scope(Session):``.

    The block is one unit of work: committed when it ends, rolled back when it raises. It has its
    own Sessions and transactions, whatever scope is around it, so an audit row can survive a
    request that is rolled back. In the block, every adopted registry works in the
    new scope.

    As a decorator, every call of the function is such a block::

        @session_scope(Session)
        def nightly() -> None: ...

    :param registries: the ``scoped_session`` objects to adopt.
    :param read_only: whether the block only reads, see :attr:`Scope.read_only`. True needs a
        Session class of :mod:`wsgi_dbsession.replica`.
    :param name: its name in log lines and for observers; that of the decorated function by
        default.
    :raises TypeError: a registry is not a ``scoped_session``, or what is decorated would run after
        the block has ended (a generator or coroutine function).
    :raises ValueError: there is no registry, its ``scopefunc`` is not :func:`current_scope`, or
        ``read_only`` is true and its Sessions are not routed.
    """

    def __init__(
        self,
        *registries: scoped_session[Any],
        name: str | None = None,
        read_only: bool | None = None,
    ) -> None:
        self._registries = registries
        self._adopted = adopt(registries)
        if read_only:
            check_routed(self._adopted)
        self._name = name
        self._read_only = read_only
        self._scope: Scope | None = None

    def __enter__(self) -> Scope:
        if self._scope is not None:
            msg = "this block is active already. Write `with session_scope(...)` anew"
            raise RuntimeError(msg)
        scope = Scope(None, observers_of(self._adopted), self._name or "session_scope")
        scope.read_only = self._read_only
        if scope.observers:
            scope.notify("opened")
        try:
            self._scope = scope
            scope.enter_block()
            return scope
        except BaseException:  # an interruption: nothing calls __exit__
            self._scope = None
            scope.leave_block()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            assert self._scope is not None, "__exit__ without __enter__"
            self._scope.close(error)
        finally:
            scope, self._scope = self._scope, None
            if scope is not None:  # pragma: no branch - else the assertion fails
                scope.close_sessions()  # an interruption may have skipped it
                scope.leave_block(error)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorate a function, so that every call is a block."""
        if (
            inspect.isgeneratorfunction(function)
            or inspect.iscoroutinefunction(function)
            or inspect.isasyncgenfunction(function)
        ):
            msg = (
                f"session_scope must decorate a plain function, got {function.__qualname__}, "
                "which runs after its call has returned. "
                "Put `with session_scope(...):` inside of it"
            )
            raise TypeError(msg)
        name = self._name or function.__qualname__

        @functools.wraps(function)
        def in_scope(*args: P.args, **kwargs: P.kwargs) -> R:
            with session_scope(*self._registries, name=name, read_only=self._read_only):
                return function(*args, **kwargs)

        return in_scope
