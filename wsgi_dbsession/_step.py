"""A step: one call into the application, and the context variable that names its scope."""

from __future__ import annotations

import os
from contextlib import suppress
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextvars import Context

# The one piece of global state: the innermost scope of the step that runs here. Its methods are
# bound once, because CPython 3.11 would bind them at each call.
_current: ContextVar[Step | None] = ContextVar("wsgi_dbsession.scope", default=None)
_get, _set, _reset = _current.get, _current.set, _current.reset


class Step:
    """The steps of a scope; a base class of ``Scope``."""

    __slots__ = ("_innermost", "_token", "in_step")

    in_step: bool
    """Whether one of its steps is running. Otherwise the scope is refused."""

    # Set by the class above: an __init__() here would cost each request a call.
    _innermost: Step | None
    _token: Token[Step | None] | None

    def enter(self) -> None:
        """Start a step: this scope is the current one, in this thread, greenlet and context."""
        # A generator may have been suspended in its own `session_scope` block.
        self._token = _set(self._innermost or self)
        self.in_step = True

    def leave(self) -> None:
        """End a step: nothing of this scope is left in the context."""
        self.in_step = False
        token, self._token = self._token, None
        if token is not None:  # otherwise an interruption came before the step had begun
            innermost = _get()
            self._innermost = None if innermost is self else innermost
            _reset(token)

    def enter_block(self) -> None:
        """Start a ``session_scope`` block."""
        _set(active_step())  # blocks that the collector has closed must not pile up
        self.enter()

    def leave_block(self, error: BaseException | None = None) -> None:
        """End a ``session_scope`` block.

        :param error: the exception that leaves it. The collector may close a generator, and with
            it a block, in the midst of a ``ContextVar.set()``. To meet another one there crashes
            CPython 3.10 and 3.11, so the variable stays, and :func:`active_step` looks past it.
        """
        self.in_step = False
        if isinstance(error, GeneratorExit) or _get() is not self or self._token is None:
            return
        with suppress(ValueError):  # a generator's block that was entered in another context
            _reset(self._token)

    @property
    def outer(self) -> Step | None:
        """The scope that this one is in, during a step."""
        token = self._token
        if token is None or token.old_value is Token.MISSING:
            return None
        outer: Step | None = token.old_value
        return None if outer is self else outer  # it is, if leave() was interrupted

    def own(self, context: Context) -> Context:
        """Make this scope the current one of a copied context."""
        if context.get(_current) is not self:
            context.run(_set, self)
        return context

    def abandon(self) -> None:
        """Deactivate the scope in a child process: it is the parent's."""
        self.in_step = False


def active_step() -> Any:
    """Return the innermost scope in whose step this is called, or None.

    It is a ``Scope``, which this floor cannot import, and a ``cast()`` above would cost a call.
    """
    step = _get()
    # A block that the collector closed is still there, see leave_block().
    while step is not None and not step.in_step:
        step = step.outer
    return step


def scopes() -> Iterator[Any]:
    """Return the active scopes, from the innermost outwards."""
    step = _get()
    while step is not None:
        if step.in_step:
            yield step
        step = step.outer


def _leave_parent() -> None:
    """Leave the parent's scopes, whose Sessions hold the parent's connections."""
    step = _get()
    while step is not None:
        step.abandon()
        step = step.outer
    _set(None)


if hasattr(os, "register_at_fork"):  # pragma: no branch - Windows has no fork
    os.register_at_fork(after_in_child=_leave_parent)
