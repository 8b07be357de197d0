"""The unit of work: its scope, and what becomes of it."""

from __future__ import annotations

from contextvars import copy_context
from typing import TYPE_CHECKING, Any, ClassVar

from ._hooks import Hook, open_savepoints
from ._outcome import Unit
from ._place import calling_line
from ._released import Released
from ._report import log
from ._step import active_step
from ._transaction import has_written

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from sqlalchemy.orm import SessionTransaction

    from ._observed import Outcome
    from ._transaction import AdoptedSession


class NoScopeError(RuntimeError):
    """A Session was asked for where no scope is active."""


def find_scope() -> Scope | None:
    """Return the scope of the running step, or None where there is none.

    For code that runs inside and outside of scopes, such as a listener of SQLAlchemy's events.
    """
    scope: Scope | None = active_step()
    return scope


def current_scope() -> Scope:
    """Return the scope of the running step: the ``scopefunc`` of your ``scoped_session``.

    ::

        Session = scoped_session(sessionmaker(engine), scopefunc=current_scope)

    :raises NoScopeError: outside of any request and of any :class:`session_scope` block, in a
        thread or greenlet that has opened none of its own, and in late work of a request whose
        step is over.
    """
    scope: Scope | None = active_step()
    if scope is None:
        msg = (
            "no active scope. In a request, wrap the WSGI application: "
            "SessionMiddleware(app, Session). In a script, a job, a shell, a test, or a thread or "
            "greenlet of your own, open a block: `with session_scope(Session):`"
        )
        raise NoScopeError(msg)
    return scope


class Observer:
    """A base class for metrics, tracing and tests, whose methods are called for each scope.

    Override the methods that you need. By default they do nothing. Pass an instance to
    ``SessionMiddleware(app, Session, observers=[...])`` or to :func:`observe`. An error in a
    method is logged and changes nothing else. The methods run in the step, or in the copied
    context of the outcome.
    """

    overridden: ClassVar[frozenset[str]] = frozenset()
    """The names of the methods that a subclass has overridden: only those are called."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        methods = (item for item in vars(Observer).items() if callable(item[1]))
        cls.overridden = frozenset(name for name, own in methods if getattr(cls, name) is not own)

    def opened(self, scope: Scope) -> None:
        """Called before the application, or the block, begins."""

    def settled(self, scope: Scope) -> None:
        """Called after each outcome, see ``scope.outcome``, ``.reason`` and ``.failure``."""

    def hook_called(self, scope: Scope, hook: Callable[..., object]) -> None:
        """Called before a hook runs."""

    def discarding(self, scope: Scope, cause: str) -> bool | None:
        """Called before the veto discards uncommitted changes.

        :param cause: such as ``"status 404"``.
        :return: True if the observer has reported it, so that it is not logged.
        """

    def commit_failed(self, scope: Scope, failure: BaseException) -> bool | None:
        """Called after a failed commit.

        :return: True if the observer has reported it, so that it is not logged.
        """

    def closed(self, scope: Scope) -> None:
        """Called when the Sessions of the scope are closed."""


class Scope(Unit):
    """One unit of work: one request, or one ``with session_scope(...)`` block.

    Made by the middleware and by :class:`session_scope`, found with :func:`current_scope` and, in
    a request, as ``environ["wsgi_dbsession.scope"]``.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<Scope of {self.name} at {id(self):#x}: {self.outcome or 'undecided'}>"

    def __hash__(self) -> int:
        msg = (
            "a scope must not be a dictionary key. If a scoped_session asked for it, nothing "
            "commits or closes its Sessions: pass the scoped_session to "
            "SessionMiddleware(app, Session) or session_scope(Session)"
        )
        raise TypeError(msg)

    @property
    def info(self) -> dict[str, Any]:
        """A place for the application's own data about this unit of work."""
        if self._info is None:
            self._info = {}
        return self._info

    # -- what the application asks for ------------------------------------------------------------

    def doom(self) -> None:
        """Roll back, whatever the status is, and even after :meth:`keep`."""
        self._word = "doomed"

    def keep(self) -> None:
        """Commit in spite of the veto, for example to count a failed login.

        An error, :meth:`doom` and an incomplete body still roll back.
        """
        self._word = self._word or "kept"

    def on_commit(self, hook: Callable[..., object], *arguments: object) -> None:
        """Call ``hook(*arguments)`` after the commit, if it takes place.

        A commit of nothing counts. An error in the hook is logged only. What the hook writes is
        committed too, before the client has the whole response. A hook that was registered inside
        of ``Session.begin_nested()`` is dropped if that savepoint is rolled back.
        """
        self._add_hook("commit", hook, arguments)

    def on_rollback(self, hook: Callable[..., object], *arguments: object) -> None:
        """Call ``hook(*arguments)`` after a rollback, see :meth:`on_commit`.

        A commit that failed counts if everything was rolled back. What the hook writes is rolled
        back too, unless it opens its own :class:`session_scope`.
        """
        self._add_hook("rollback", hook, arguments)

    def _add_hook(
        self, outcome: Outcome, hook: Callable[..., object], arguments: tuple[object, ...]
    ) -> None:
        savepoints = [
            each for session in self.sessions.values() for each in open_savepoints(session)
        ]
        context = self.own(copy_context())
        self.context = self.context or context.copy()  # no context can be entered twice
        self._hooks += (Hook(outcome, hook, arguments, context, tuple(savepoints)),)

    def drop_hooks(self, savepoint: SessionTransaction) -> None:
        """Forget the hooks that were registered inside of a savepoint."""
        self._hooks = tuple(each for each in self._hooks if savepoint not in each.savepoints)

    def released(self) -> AbstractContextManager[None]:
        """Give the connections back to the pool for the length of a block: around a slow call.

        ::

            order = Session.get(Order, 7)
            with current_scope().released():
                answer = requests.post(...)  # no connection, no open transaction
            order.answer = answer  # a new transaction, committed with the response

        Objects stay attached to their Sessions, and do not expire. A statement in the block
        raises; an attribute may be set, and is flushed afterwards. An independent
        ``with session_scope(Session):`` works in the block.

        The transactions end, and what follows the block runs in new ones: locks are gone, and the
        snapshot of REPEATABLE READ and SERIALIZABLE is another one.

        :return: a context manager. A block within such a block changes nothing.
        :raises RuntimeError: at the start of the block, and nothing is lost: something was written
            or is pending, it is unknown whether something was written, or a Session is in
            ``with Session.begin():`` or ``begin_nested()``.
        """
        return Released(self)

    # -- outcome ----------------------------------------------------------------------------------

    def discarded(self, session: AdoptedSession) -> None:
        """Record that the application closes a Session in an open transaction."""
        if self._settling:
            return
        wrote = (session.dbsession_has_written or has_written)(session)
        if wrote:
            self._discarded = self._discarded or _refuse_discarded(calling_line())
        elif wrote is None:
            line = calling_line()
            if line not in session.dbsession_lines:
                session.dbsession_lines.add(line)
                log.warning(
                    "%s: closed a Session in an open transaction at %s; what it wrote, if "
                    "anything, is lost. Remove that line, or call Session.rollback() before it",
                    self.name,
                    line,
                    extra=self.extra(),
                )


def _refuse_discarded(line: str) -> BaseException:
    msg = (
        f"cannot commit: a Session was closed at {line}, and what it had written is lost. Remove "
        "that line, because the middleware and session_scope close Sessions themselves, or call "
        "Session.commit() or Session.rollback() before it"
    )
    return RuntimeError(msg)
