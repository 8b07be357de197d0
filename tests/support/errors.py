"""What goes wrong in an application, for the tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wsgi_dbsession import current_scope

if TYPE_CHECKING:
    from collections.abc import Callable


class AppError(Exception):
    """The application's error."""


class Kill(BaseException):
    """What ends a greenlet or a process from outside, in the manner of GreenletExit."""


def fail() -> None:
    raise AppError


def notes_of(error: BaseException) -> list[str]:
    """Return what ``add_note()`` has added to an error."""
    found: list[str] = getattr(error, "__notes__", [])
    return found


def raise_error(*_: object) -> None:
    raise AppError


def raise_kill(*_: object) -> None:
    raise Kill


def doom() -> None:
    current_scope().doom()


def interrupt_by(error: BaseException) -> Callable[[], None]:
    def interrupt() -> None:
        raise error

    return interrupt
