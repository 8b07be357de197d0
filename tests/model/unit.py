"""A unit of work in the model: section 5 of the design, without SQLAlchemy and without care."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from sqlalchemy.exc import SQLAlchemyError

from tests.model.programs import Boom, Brief, Hook, Interruption, Outcome, RegistryName

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from _typeshed.wsgi import StartResponse, WSGIEnvironment

    from tests.model.reference import Model

ORPHAN = "orphan"
INVALID = "invalid"


@dataclass(frozen=True, repr=False)
class Setup(Brief):
    """How the middleware is made, and on what."""

    commit_on: Literal["complete", "headers", "close"] = "complete"
    commit_error: bool = False
    vetoes: bool = True
    registries: tuple[RegistryName, ...] = ("A",)
    nested: bool = False  # a second middleware around the first, each with one registry
    twophase: tuple[RegistryName, ...] = ()
    aborts: bool = False  # a failed statement spoils its transaction, as it does on PostgreSQL

    def known(self, registry: RegistryName) -> RegistryName:
        return registry if registry in self.registries else "A"


class Refused(SQLAlchemyError):  # noqa: N818 - what it is, in one word
    """The database, or SQLAlchemy, said no."""


def veto(environ: WSGIEnvironment, status: str, headers: list[tuple[str, str]]) -> bool:
    """Like the default one, with a status for which it fails."""
    if status.startswith("418"):
        raise Boom
    return status[:1] in ("4", "5")


def say_sorry(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Answer in place of a response whose commit failed."""
    start_response("503 Sorry", [])
    return [b"sorry"]


# -- section 5: which -----------------------------------------------------------------------------


@dataclass
class Transaction:
    """What a Session holds from its first use to the outcome."""

    pending: list[str] = field(default_factory=list)  # not flushed yet
    rows: list[str] = field(default_factory=list)
    connected: bool = False
    flushed: bool = False  # something, so that the Session knows that it wrote
    touched: bool = False  # the database knows that it wrote, or tried to and took it back
    doubted: bool = False  # it cannot tell what it took back
    aborted: bool = False  # by the database, after a failed statement
    inactive: bool = False  # by SQLAlchemy, after a failed flush

    def execute(self) -> None:
        if self.inactive or self.aborted:
            raise Refused
        self.connected = True

    def flush(self) -> None:
        if self.pending:
            if self.inactive:
                raise Refused  # what was added since is still there
            self.connected = True
            if self.aborted or INVALID in self.pending:
                self.inactive = True
                self.pending = []
                raise Refused
            self.rows += self.pending
            self.pending = []
            self.flushed = True

    def has_written(self) -> bool | None:
        """Say whether there is something to lose; None if that cannot be known."""
        if self.pending or self.flushed:
            return True
        if self.inactive or self.aborted:
            return None
        if self.rows and not self.doubted:
            return True
        return None if self.rows or self.touched else False


@dataclass
class Connected:
    """A Session: whether it has a transaction, and whether its next commit is interrupted."""

    twophase: bool
    transaction: Transaction | None = None
    trap: bool = False

    def commit(self, committed: list[str]) -> None:
        transaction = self.transaction or Transaction()  # of a Session that has none, it is begun
        if transaction.inactive:
            raise Refused
        if self.trap:
            self.trap = False
            raise Interruption
        transaction.flush()
        if transaction.aborted:
            if self.twophase:
                raise Refused  # what the first phase, like a COMMIT, has silently rolled back
        else:
            if ORPHAN in transaction.rows:
                raise Refused
            committed += transaction.rows
        self.transaction = None


class Unit:
    """A scope."""

    def __init__(self, model: Model, environ: WSGIEnvironment | None = None) -> None:
        self.model = model
        self.environ = environ
        self.lane = model.lanes
        model.lanes += 1
        self.sessions: dict[RegistryName, Connected] = {}
        self.in_use = False  # the application has asked for a Session
        self.doomed = False
        self.kept = False
        self.hooks: list[tuple[Hook, str]] = []
        self.discarded = False  # work that the application has closed a Session over
        self.decided = False
        self.outcome: Outcome | None = None
        self.failure: BaseException | None = None  # of a commit

    def begun(self) -> list[tuple[RegistryName, Connected]]:
        setup = self.model.setup
        # The inner one of two middlewares is made first, and so are its registries adopted.
        names = setup.registries[::-1] if setup.nested else setup.registries
        return [
            (name, self.sessions[name])
            for name in names
            if name in self.sessions and self.sessions[name].transaction is not None
        ]

    def undecided(self) -> bool:
        """Say whether there is something to decide, or something new since the last outcome."""
        return bool(
            self.hooks or self.discarded or self.begun() or (self.in_use and not self.decided)
        )

    def settle(
        self,
        error: BaseException | None = None,
        complete: bool = True,
        vetoes: Callable[[], bool] = bool,
    ) -> None:
        """Settle, and again what hooks have begun."""
        rounds = 0
        while self.undecided() and not (rounds > 1 and self.outcome == "rollback"):
            self.settle_once(error, complete, vetoes)
            rounds += 1

    def settle_once(
        self, error: BaseException | None, complete: bool, vetoes: Callable[[], bool]
    ) -> None:
        """The table of section 5, and what follows from it."""
        self.decided = True
        try:
            if error is not None or self.doomed or not complete:
                outcome: Outcome = "rollback"
            elif self.kept:
                outcome = "commit"
            elif vetoes():
                self.say_what_is_discarded()
                outcome = "rollback"
            else:
                outcome = "commit"
        except BaseException:
            self.roll_back()
            raise
        if outcome == "rollback":
            self.roll_back()
            return
        committed: list[RegistryName] = []
        try:
            if self.discarded:
                raise RuntimeError
            self.commit(committed)
        except BaseException as failure:
            self.failure = failure
            self.discarded = False
            for session in self.sessions.values():
                session.transaction = None
            self.model.log.append(f"ERROR: {'partly' if committed else 'rolled back'}")
            if committed:
                self.hooks.clear()  # neither kind of hook knows of half a commit
            else:
                self.conclude("rollback")
            raise
        self.conclude("commit")

    def commit(self, committed: list[RegistryName]) -> None:
        """All are flushed, the two-phase ones prepared, and then all are committed."""
        begun = self.begun()
        prepared = []
        for _, session in begun:
            assert session.transaction is not None
            session.transaction.flush()
        for _, session in begun:
            transaction = session.transaction
            assert transaction is not None
            if transaction.aborted or transaction.inactive:
                raise Refused
        for name, session in begun:
            if session.twophase:
                rows: list[str] = []
                session.commit(rows)
                prepared.append((name, rows))
        for name, session in begun:
            if session.transaction is not None:
                session.commit(self.model.rows(self.lane, name))
                committed.append(name)
        for name, rows in prepared:
            self.model.rows(self.lane, name).extend(rows)

    def roll_back(self) -> None:
        for session in self.sessions.values():
            session.transaction = None
        self.conclude("rollback")

    def conclude(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.discarded = False
        self.run_hooks(outcome)

    def run_hooks(self, outcome: Outcome) -> None:
        self.model.stack.append(self)
        while self.hooks:
            hook, label = self.hooks.pop(0)
            if hook.when != outcome:
                continue
            self.model.hooks_run.append(label)
            if hook.then == "raise":
                self.model.log.append("ERROR: a hook failed")
            elif hook.then == "add":
                self.model.do("add", "A", label)
            elif hook.then == "register another":
                self.hooks.append((Hook(hook.when), f"{label}'"))
        self.model.stack.pop()

    def say_what_is_discarded(self) -> None:
        assert self.environ is not None
        safe = self.environ["REQUEST_METHOD"] in ("GET", "HEAD")
        for _, session in self.begun():
            assert session.transaction is not None
            if not safe or session.transaction.pending:
                self.model.log.append("INFO: discarding uncommitted changes")
                return

    def end(
        self,
        error: BaseException | None = None,
        complete: bool = True,
        vetoes: Callable[[], bool] = bool,
    ) -> None:
        try:
            self.settle(error, complete, vetoes)
        except BaseException:
            if error is None:
                raise
        finally:
            self.sessions.clear()
            self.in_use = False
