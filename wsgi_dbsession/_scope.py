"""The unit of work: its scope, the context variable that names it, and what becomes of it."""

from __future__ import annotations

import functools
import inspect
import os
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

from sqlalchemy.orm import scoped_session, sessionmaker

from ._fork import dispose_after_fork, watch_registry
from ._transaction import commit, find, is_begun, log, remove, rollback

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType
    from typing import TypeAlias

    from _typeshed.wsgi import WSGIEnvironment

Outcome: TypeAlias = Literal["commit", "rollback"]
Reason: TypeAlias = Literal[
    "error", "doomed", "incomplete", "kept", "veto", "complete", "commit failed"
]

P = ParamSpec("P")
R = TypeVar("R")

# The one piece of global state: the innermost scope of the step that runs here.
_current: ContextVar[Scope | None] = ContextVar("wsgi_dbsession.scope", default=None)

# The attribute of a registry that may hold another class than `Scope`.
SCOPE_CLASS = "_wsgi_dbsession_scope_class"

# RFC 9110, section 9.2.1: a request with one of these methods is not meant to write.
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})


class NoScopeError(RuntimeError):
    """A Session was asked for where no scope is in force."""


def current_scope() -> Scope:
    """Return the scope of the running step: the ``scopefunc`` of your ``scoped_session``.

    ::

        Session = scoped_session(sessionmaker(engine), scopefunc=current_scope)

    :raises NoScopeError: outside of any request and of any :class:`session_scope` block, in a
        thread or greenlet that has opened none of its own, and in late work of a request whose
        step is over.
    """
    scope = _current.get()
    if scope is None or not scope.in_step:
        msg = (
            "there is no scope here to keep a Session in. In a request: is the WSGI application "
            "wrapped in SessionMiddleware(app, Session)? In a script, a job, a shell, or a thread "
            "or greenlet that the application started: put the work into "
            "`with session_scope(Session):`. To configure a registry, no scope is needed: "
            "`Session.session_factory.configure(...)`"
        )
        raise NoScopeError(msg)
    if not scope.in_use:
        dispose_after_fork()
        scope.in_use = True
    return scope


class Scope:
    """One unit of work: one request, or one ``with session_scope(...)`` block.

    Made by the middleware and by :class:`session_scope`, found with :func:`current_scope` and, in
    a request, as ``environ["wsgi_dbsession.scope"]``.
    """

    __slots__ = (
        "_hooks",
        "_innermost",
        "_word",
        "environ",
        "in_step",
        "in_use",
        "info",
        "outcome",
        "outer",
        "reason",
        "registries",
    )

    environ: WSGIEnvironment | None
    """The request's environ; None in a ``session_scope`` block and once the request is over."""

    info: dict[str, Any]
    """A place for the application's own data about this unit of work."""

    outcome: Outcome | None
    """What became of the work, "rollback" also if the commit failed.

    None until it is decided, and where there is nothing to decide: no Session was asked for.
    """

    reason: Reason | None
    """Why the outcome is what it is."""

    in_step: bool
    """Whether one of its steps is running; between them, and afterwards, it is refused."""

    in_use: bool
    """Whether a registry has asked for it, so that it may have Sessions."""

    outer: Scope | None
    """The scope that this one is in, during a step."""

    registries: tuple[scoped_session[Any], ...]
    """The registries whose Sessions share the outcome."""

    def __init__(
        self,
        registries: tuple[scoped_session[Any], ...],
        environ: WSGIEnvironment | None = None,
    ) -> None:
        self.environ = environ
        self.info = {}
        self.outcome = None
        self.reason = None
        self.outer = None
        self.registries = registries
        self.in_step = False
        self.in_use = False
        self._word: Literal["doomed", "kept"] | None = None
        self._hooks: tuple[tuple[Outcome, Callable[[], object]], ...] = ()
        self._innermost: Scope | None = None

    def __repr__(self) -> str:
        environ = self.environ
        what = "" if environ is None else f" of {describe(environ)}"
        return f"<Scope{what} at {id(self):#x}: {self.outcome or 'undecided'}>"

    # -- what the application says ----------------------------------------------------------------

    def doom(self) -> None:
        """Roll back, whatever else is said."""
        self._word = "doomed"

    def keep(self) -> None:
        """Commit in spite of the veto: a failed login that must be counted.

        An error, :meth:`doom` and an incomplete body still roll back.
        """
        self._word = self._word or "kept"

    def on_commit(self, hook: Callable[[], object]) -> None:
        """Call ``hook()`` after the commit, if it takes place; errors in it are logged only.

        A commit of nothing counts: the work succeeded, though it had no use for the database.
        """
        self._hooks = (*self._hooks, ("commit", hook))

    def on_rollback(self, hook: Callable[[], object]) -> None:
        """Call ``hook()`` after a rollback; errors in it are logged only.

        A failed commit counts, though it may have taken place if its connection broke.
        """
        self._hooks = (*self._hooks, ("rollback", hook))

    # -- steps ------------------------------------------------------------------------------------

    def enter(self) -> None:
        """Start a step: this scope is the current one, in this thread, greenlet and context."""
        self.outer = _current.get()
        # A generator may have been suspended in a `session_scope` block of its own.
        innermost = self._innermost
        _current.set(self if innermost is None or not innermost.in_step else innermost)
        self.in_step = True

    def leave(self) -> None:
        """End a step: nothing of this scope is left in the context."""
        self.in_step = False
        innermost = _current.get()
        self._innermost = None if innermost is self else innermost
        # set(), not reset(): the next step may run in another context, which refuses the token.
        _current.set(self.outer)
        self.outer = None

    def leave_block(self) -> None:
        """End a ``session_scope`` block."""
        self.in_step = False
        # The collector may close a generator, and with it a block, in the midst of anything else.
        if _current.get() is self:
            _current.set(self.outer)
        self.outer = None

    def join(self, registries: tuple[scoped_session[Any], ...]) -> None:
        """Take care of these registries too: those of a nested middleware."""
        self.registries = tuple(dict.fromkeys(self.registries + registries))

    # -- outcome ----------------------------------------------------------------------------------

    def decide(
        self,
        error: BaseException | None,
        complete: bool,
        veto: Callable[[], bool] | None,
    ) -> tuple[Outcome, Reason]:
        """Say which outcome it is, and why: the first row that holds."""
        if error is not None:
            return "rollback", "error"
        if self._word == "doomed":
            return "rollback", "doomed"
        if not complete:
            return "rollback", "incomplete"
        if self._word == "kept":
            return "commit", "kept"
        if veto is not None and veto():
            return "rollback", "veto"
        return "commit", "complete"

    def settle(
        self,
        error: BaseException | None = None,
        *,
        complete: bool = True,
        veto: Callable[[], bool] | None = None,
    ) -> None:
        """Decide, carry it out, and run the hooks. Call it in a step.

        :raises BaseException: the veto raised or the commit failed, and all was rolled back.
        """
        innermost = _current.get()
        failing: Reason = "error"
        # The outcome and its hooks are this scope's, though the generator is in another block.
        if innermost is not self:
            _current.set(self)
        try:
            outcome, reason = self.decide(error, complete, veto)
            if outcome == "commit":
                failing = "commit failed"
                commit(find(self.registries, self))
        except BaseException as failure:
            self._roll_back(failure, failing)
            raise
        else:
            if outcome == "commit":
                self.outcome, self.reason = outcome, reason
                if self._hooks:
                    self._run_hooks(outcome)
            else:
                if reason == "veto":
                    self._log_discarded()
                self._roll_back(error, reason)
        finally:
            if innermost is not self:
                _current.set(innermost)

    def undecided(self) -> bool:
        """Say whether there is something that no outcome has covered yet."""
        if self._hooks:
            return True
        return self.in_use and (self.outcome is None or is_begun(self.registries, self))

    def end(
        self,
        error: BaseException | None = None,
        *,
        complete: bool = True,
        veto: Callable[[], bool] | None = None,
    ) -> None:
        """Settle what is undecided and remove the Sessions. Call it in the last step.

        :raises BaseException: see :meth:`settle`; the Sessions are removed all the same. Nothing
            is raised where there is an `error`: the first one is the one that propagates.
        """
        if not (self.in_use or self._hooks):
            self.environ = None
            return
        try:
            # A hook, or a listener of one Session's commit, may begin a new transaction.
            again = bool(self._hooks) or len(self.registries) > 1
            if self.undecided():
                self.settle(error, complete=complete, veto=veto)
            if again and self.undecided():
                self.settle(error, complete=complete, veto=veto)
        except BaseException:
            self._forget()
            if error is None:
                raise
        else:
            interruption = self._forget()
            if interruption is not None and error is None:
                raise interruption

    def _forget(self) -> BaseException | None:
        # The environ refers to this scope: a cycle would keep both until a collection.
        self.environ = None
        return remove(self.registries, self)

    def _roll_back(self, error: BaseException | None, reason: Reason) -> None:
        self.outcome, self.reason = "rollback", reason
        try:
            rollback(find(self.registries, self), error)
        finally:
            self._run_hooks("rollback")

    def _run_hooks(self, outcome: Outcome) -> None:
        while self._hooks:
            hooks, self._hooks = self._hooks, ()
            for when, hook in hooks:
                if when == outcome:
                    try:
                        hook()
                    except Exception:
                        log.exception("a hook failed after the %s: %r", outcome, hook)

    def _log_discarded(self) -> None:
        environ = self.environ or {}
        safe = environ.get("REQUEST_METHOD") in _SAFE_METHODS
        for session in find(self.registries, self):
            # Which statements were writes, nobody knows: the method says what to expect.
            if session.in_transaction() and (
                not safe or session.new or session.dirty or session.deleted
            ):
                log.info(
                    "%s: what it wrote is rolled back because of its status; "
                    "scope.keep() commits in spite of that",
                    describe(environ),
                )
                return


class session_scope:  # noqa: N801 - used like contextlib's context managers
    """A scope of your own, in a request or outside: ``with session_scope(Session):``.

    The block is one unit of work: committed when it ends, rolled back when it raises. It is
    independent of the scope around it: it has Sessions and transactions of its own, so an audit
    row can survive a request that is rolled back. In the block, every registry works in the new
    scope: those given, and those of the scope around it.

    As a decorator, every call of the function is such a block::

        @session_scope(Session)
        def nightly() -> None: ...

    :param registries: the ``scoped_session`` objects whose Sessions take part.
    :raises TypeError: a registry is no ``scoped_session``, or what is decorated would run after
        the block has ended (a generator or coroutine function).
    :raises ValueError: there is no registry, or its ``scopefunc`` is not :func:`current_scope`.
    """

    def __init__(self, *registries: scoped_session[Any]) -> None:
        self._registries = check_registries(registries)
        self._scope: Scope | None = None

    def __enter__(self) -> Scope:
        if self._scope is not None:
            msg = "this block is entered already: write `with session_scope(...)` anew"
            raise RuntimeError(msg)
        outer = _current.get()
        scope = self._scope = make_scope(self._registries)
        if outer is not None:
            scope.join(outer.registries)
        scope.enter()
        return scope

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        scope, self._scope = self._scope, None
        assert scope is not None, "__exit__ without __enter__"
        try:
            scope.end(error)
        finally:
            scope.leave_block()

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorate a function, so that every call is a block."""
        if (
            inspect.isgeneratorfunction(function)
            or inspect.iscoroutinefunction(function)
            or inspect.isasyncgenfunction(function)
        ):
            msg = (
                f"{function.__qualname__} runs after its call has returned, when the scope is "
                "over: put `with session_scope(...):` inside of it"
            )
            raise TypeError(msg)

        @functools.wraps(function)
        def in_scope(*args: P.args, **kwargs: P.kwargs) -> R:
            with session_scope(*self._registries):
                return function(*args, **kwargs)

        return in_scope


def check_registries(
    registries: tuple[scoped_session[Any], ...],
) -> tuple[scoped_session[Any], ...]:
    """Return the registries if they can be used as they are, and watch them from now on.

    :raises TypeError: one is not a ``scoped_session`` over a ``sessionmaker``.
    :raises ValueError: there is none, or one has another ``scopefunc``.
    """
    mend = "Session = scoped_session(sessionmaker(engine), scopefunc=current_scope)"
    if not registries:
        msg = f"no session registry was given: pass the application's own, made by `{mend}`"
        raise ValueError(msg)
    for registry in registries:
        kind: type = type(registry)  # of which the annotation knows only what it should be
        if not issubclass(kind, scoped_session):
            msg = f"a session registry is a scoped_session, not {registry!r}: make it by `{mend}`"
            raise TypeError(msg)
        # A thread-local registry has no such attribute.
        if getattr(registry.registry, "scopefunc", None) is not current_scope:
            msg = (
                f"the scopefunc of {registry!r} is not current_scope, so its Sessions would not "
                f"belong to the request: make it by `{mend}`"
            )
            raise ValueError(msg)
        factory: type = type(registry.session_factory)
        if not issubclass(factory, sessionmaker):
            msg = f"the factory of {registry!r} is not a sessionmaker: make it by `{mend}`"
            raise TypeError(msg)
    for registry in registries:
        watch_registry(registry)
    return tuple(dict.fromkeys(registries))


def make_scope(
    registries: tuple[scoped_session[Any], ...], environ: WSGIEnvironment | None = None
) -> Scope:
    """Make a scope, of the class that a registry asks for: that is how tests look on."""
    for registry in registries:
        kind: type[Scope] | None = vars(registry).get(SCOPE_CLASS)
        if kind is not None:
            return kind(registries, environ)
    return Scope(registries, environ)


def scope_of(environ: WSGIEnvironment) -> Scope | None:
    """Return the scope in force if it is that of this request."""
    scope = _current.get()
    return scope if scope is not None and scope.environ is environ else None


def scopes_in_force() -> Iterator[Scope]:
    """Go through the scopes in force, from the innermost outwards."""
    scope = _current.get()
    while scope is not None:
        yield scope
        scope = scope.outer


def describe(environ: WSGIEnvironment) -> str:
    """Return method and path of a request, for a log line."""
    path = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
    return f"{environ.get('REQUEST_METHOD', '?')} {path}"


if hasattr(os, "register_at_fork"):  # pragma: no branch - Windows has no fork
    # A child must not go on with its parent's Session, which holds its parent's connection.
    os.register_at_fork(after_in_child=lambda: _current.set(None))
