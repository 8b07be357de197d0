"""The limits and the retryable errors, and the attempts that they allow."""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple, cast

from wsgi_dbsession._report import log

from ._attempt import UNKNOWN, is_retryable
from ._codes import chain, describe_error

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from ._attempt import Attempt

On: TypeAlias = "type[Exception] | tuple[type[Exception], ...] | Callable[[Exception], bool]"


class Policy(NamedTuple):
    """How often, for how long and for which further errors to retry, see RetryMiddleware."""

    attempts: int
    backoff: float
    backoff_max: float
    timeout: float
    on: tuple[On, ...]
    retry_connect: bool

    def check(self) -> Policy:
        """Return this policy if it is valid.

        :raises TypeError: ``on`` is neither exception classes nor callable.
        :raises ValueError: a number is too small.
        """
        if self.attempts < 1:
            msg = f"attempts must be at least 1, got {self.attempts!r}. Count the first one too"
            raise ValueError(msg)
        for name in ("backoff", "backoff_max", "timeout"):
            check_not_negative(name, getattr(self, name), "seconds")
        for on in self.on:
            if not _is_choice(on):
                msg = (
                    "on must be an exception class, a tuple of them, or callable, got "
                    f"{on!r}. Pass, for example, on=StaleDataError"
                )
                raise TypeError(msg)
        return self

    def find(self, error: BaseException) -> str | None:
        """Describe the retryable error among this one and its causes, or return None."""
        for each in chain(error):
            if is_retryable(each) or (isinstance(each, Exception) and self._chooses(each)):
                return describe_error(each)
        return None

    def _chooses(self, error: Exception) -> bool:
        return any(_matches(on, error) for on in self.on)


def _matches(on: On, error: Exception) -> bool:
    if isinstance(on, (type, tuple)):
        return isinstance(error, on)
    try:
        return bool(on(error))
    except Exception:
        log.exception("ignoring on=%r, which failed for %s", on, describe_error(error))
        return False


def _is_choice(on: object) -> bool:
    if isinstance(on, tuple):
        classes = cast("tuple[object, ...]", on)
        return all(isinstance(each, type) and issubclass(each, Exception) for each in classes)
    return issubclass(on, Exception) if isinstance(on, type) else callable(on)


def check_not_negative(name: str, value: float, unit: str) -> None:
    """Raise ``ValueError`` if an argument is negative."""
    if not value >= 0:
        msg = f"{name} must be at least 0, got {value!r}. Pass a number of {unit}"
        raise ValueError(msg)


class Run(ABC):
    """The attempts at one unit of work."""

    __slots__ = ("_deadline", "_delay", "attempts", "number", "policy")

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.attempts = policy.attempts
        self.number: int = 0  # of the current attempt
        self._deadline = time.monotonic() + policy.timeout
        self._delay = 0.0

    @abstractmethod
    def describe(self) -> str:
        """Return a name for the unit of work, for log lines."""

    def extra(self) -> dict[str, object]:
        """Return the fields of a log record, for machines."""
        return {"scope": self.describe(), "attempt": self.number, "attempts": self.attempts}

    def has_next(self) -> bool:
        """Return whether attempts and time are left."""
        return self.number < self.attempts and time.monotonic() < self._deadline

    def decide(self, attempt: Attempt, error: Exception | None) -> bool:
        """Return whether another attempt follows this failed one, and log the decision.

        :param error: the exception that was raised, None if only the response shows the failure.
        """
        reason, obstacle = attempt.reason_for(error), attempt.obstacle()
        unlogged = attempt.unlogged
        what = (self.describe(), self.number, self.attempts)
        if obstacle == UNKNOWN and not attempt.is_logged:
            message = (
                "not retrying %s: attempt %d of %d lost its connection during COMMIT, "
                "outcome unknown"
            )
            log.error(message, *what, exc_info=unlogged, extra=self.extra())
        if reason is None or obstacle == UNKNOWN:
            return False
        extra = {**self.extra(), "error": reason}
        if obstacle is not None:
            message = "not retrying %s: attempt %d of %d failed with %s, but %s"
            extra["obstacle"] = obstacle
            if unlogged is None:
                log.info(message, *what, reason, obstacle, extra=extra)
            else:  # a hook has committed after the failed commit
                log.error(message, *what, reason, obstacle, exc_info=unlogged, extra=extra)
            return False
        if not self.has_next():
            message = "giving up on %s: attempt %d of %d failed with %s"
            log.warning(message, *what, reason, extra=extra)
            return False
        delay = self._delay = self._choose_delay()
        message = "retrying %s: attempt %d of %d failed with %s, next in %.3f s"
        log.info(message, *what, reason, delay, extra={**extra, "delay": delay})
        return True

    def _choose_delay(self) -> float:
        policy = self.policy
        # Full jitter: see "Exponential Backoff And Jitter" in the AWS Architecture Blog.
        ceiling = min(policy.backoff_max, policy.backoff * 2.0 ** min(self.number - 1, 60))
        return min(random.uniform(0, ceiling), self._deadline - time.monotonic())

    def pause(self) -> None:
        """Wait before the next attempt."""
        if self._delay > 0:
            time.sleep(self._delay)
