"""Retry outside of requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from wsgi_dbsession._block import session_scope

from ._attempt import KEY, Attempt
from ._listeners import listen
from ._observer import OBSERVER
from ._policy import Policy, Run

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.orm import scoped_session

    from ._policy import On

R = TypeVar("R")


def run_transaction(
    function: Callable[[], R],
    *registries: scoped_session[Any],
    attempts: int = 3,
    backoff: float = 0.05,
    backoff_max: float = 1.0,
    timeout: float = 10.0,
    on: On = (),
    retry_connect: bool = False,
) -> R:
    """Call a function in its own ``session_scope`` block, again if its transaction lost a race.

    ::

        def transfer() -> None:
            Session.get_one(Account, 1).balance -= 10
            Session.get_one(Account, 2).balance += 10

        run_transaction(transfer, Session)

    It may be called several times, so pass its side effects outside of the database to
    :meth:`Scope.on_commit`.

    :param function: the function, which is called without arguments.
    :param registries: see :class:`session_scope`.
    :param attempts: see :class:`RetryMiddleware`, also for the arguments below.
    :return: what the function returned in the attempt that was committed.
    :raises TypeError: it is a generator or coroutine function, which would run after the block;
        or see :class:`session_scope` and :class:`RetryMiddleware`.
    :raises ValueError: see :class:`session_scope` and :class:`RetryMiddleware`.
    :raises BaseException: the exception of the last attempt.
    """
    policy = Policy(attempts, backoff, backoff_max, timeout, (on,), retry_connect).check()
    call = _Call(policy, function)
    block = session_scope(*registries, name=call.describe())
    block(function)  # raises if the function would run after the block
    listen()
    while True:
        call.number += 1
        attempt = Attempt(policy.find, call.has_next, retry_connect=retry_connect)
        try:
            with block as scope:
                scope.info[KEY] = attempt
                scope.observers += (OBSERVER,)
                return function()
        except Exception as error:
            if not call.decide(attempt, error):
                raise
        call.pause()


class _Call(Run):
    """The attempts of :func:`run_transaction`."""

    __slots__ = ("_function",)

    def __init__(self, policy: Policy, function: Callable[[], object]) -> None:
        super().__init__(policy)
        self._function = function

    def describe(self) -> str:
        """Return the function's name, for log lines."""
        return f"{getattr(self._function, '__qualname__', self._function)}()"
