"""Programs that break a promise, and must be caught in every run: else the checker is blind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import Session, scoped_session, sessionmaker

from wsgi_dbsession import (
    Scope,
    SessionMiddleware,
    _moment,
    _outcome,
    _spoiled,
    _transaction,
    session_scope,
)
from wsgi_dbsession._start import body_length
from wsgi_dbsession._transaction import Commit
from wsgi_dbsession.retry import RetryMiddleware
from wsgi_dbsession.retry._attempt import Attempt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    Body = Iterable[bytes]
    Registry = scoped_session[Session]
    Views = Callable[[Registry, Registry], WSGIApplication]


@dataclass(frozen=True)
class Control:
    """A wrong program, and which violation gives it away."""

    name: str
    #: what is wrong with it, for the report
    wrong: str
    #: the kinds of violation of which at least one must be found
    caught_by: tuple[str, ...]
    #: the only transfers that are sent: mount, body, work
    shapes: tuple[tuple[str, str, str], ...]
    faults: tuple[str, ...] = ()
    #: whether clients repeat their requests until they have an answer, without a key
    repeats: bool = False
    #: whether it shows in the requests after the faults only
    calm: bool = False
    #: whether it needs PostgreSQL
    postgres: bool = False


LOST = "success without its transfer"
LATE = "success that a later reader does not see"
TRANSFER = (("plain", "list", "transfer"),)

CONTROLS = [
    Control(
        "after_request",
        "a thread-local session, committed when the view returns and removed afterwards",
        (LOST,),
        (("plain", "unsized", "transfer"),),
    ),
    Control(
        "commit in close()",
        "a commit by hand in the `close()` of the response",
        (LOST, LATE),
        (("plain", "list", "late flush"), ("plain", "sized", "transfer")),
    ),
    Control(
        'commit_on="close"',
        "the package, told to commit after the response",
        (LOST, LATE),
        (("plain", "list", "late flush"), ("plain", "list", "transfer")),
    ),
    Control(
        "commit after the last block",
        "the package, which does not count the bytes of the body",
        (LOST, LATE),
        (("plain", "sized", "late flush"), ("plain", "sized", "transfer")),
    ),
    Control(
        "no refusal of aborted transactions",
        "the package, which commits what the database has aborted",
        (LOST,),
        (("plain", "list", "swallowed error"),),
        postgres=True,
    ),
    Control(
        "no refusal of discarded work",
        "the package, which does not see that the application closed its Session",
        (LOST,),
        (("plain", "list", "closed Session"),),
    ),
    Control(
        "no veto",
        "the package, which commits on every status",
        ("refusal, but the transfer is there",),
        (("plain", "list", "veto"),),
    ),
    Control(
        "an unknown outcome called a rollback",
        "the package, which takes a lost answer to COMMIT for a refusal",
        ("refusal, but the transfer is there",),
        TRANSFER,
        faults=("the answer to COMMIT is lost",),
    ),
    Control(
        "a retry of everything",
        "the package, which retries what may have been committed",
        ("transfer twice",),
        (("retry", "list", "transfer"),),
        faults=("the answer to COMMIT is lost",),
    ),
    Control(
        "a client without a key",
        "a client that repeats its request until it has an answer, without an `Idempotency-Key`",
        ("transfer twice",),
        (("keys", "list", "transfer"),),
        faults=("the answer to COMMIT is lost",),
        repeats=True,
    ),
    Control(
        "hooks of everything",
        "the package, which runs `on_commit` hooks after a rollback too",
        ("hook of a commit that did not take place",),
        (("plain", "list", "error"),),
    ),
    Control(
        "hooks of savepoints",
        "the package, which keeps the hooks of a savepoint that was rolled back",
        ("hook of a savepoint that was rolled back",),
        (("plain", "list", "savepoints"),),
    ),
    Control(
        "no hooks",
        "the package, which forgets its hooks",
        ("commit without its hook",),
        TRANSFER,
    ),
    Control(
        "one database of two",
        "the package, which commits the first Session only",
        ("in one database only",),
        (("plain", "list", "two registries"),),
    ),
    Control(
        "inner blocks undone",
        "the package, which rolls back the blocks inside of a request",
        ("inner block lost",),
        (("plain", "list", "inner block"),),
    ),
    Control(
        "a commit half-way",
        "a view that commits between the two changes of a transfer",
        ("a reader saw another sum",),
        (("plain", "sized", "commit half-way"),),
    ),
    Control(
        "a connection kept",
        "a view that keeps a connection of its own",
        ("left over",),
        (("plain", "list", "connection kept"),),
    ),
    Control(
        "requests kept",
        "a middleware that keeps each request",
        ("memory that grows with each request",),
        TRANSFER,
        calm=True,
    ),
]


# -- rules that are removed -----------------------------------------------------------------------


def apply(name: str) -> None:
    """Remove a rule of the package in this process, if that is what the control does."""
    change = CHANGES.get(name)
    if change is not None:
        change()


def _replace(holder: Any, name: str, value: object) -> None:
    assert hasattr(holder, name), f"{holder} has no {name}: the control removes nothing"
    setattr(holder, name, value)


def _count_no_bytes() -> None:
    length = body_length
    _replace(_moment, "body_length", lambda *arguments: length(*arguments) and float("inf"))


def _refuse_no_aborted() -> None:
    _replace(_spoiled, "refusal", lambda connection, driver: None)


def _refuse_no_discarded() -> None:
    _replace(_transaction.AdoptedSession, "_report_discard", lambda session: None)


def _call_unknown_a_rollback() -> None:
    _replace(_transaction, "_leaves_open", lambda failure: False)


def _retry_everything() -> None:
    _replace(Attempt, "obstacle", lambda attempt: None)
    _replace(Attempt, "reason_for", lambda attempt, error: "whatever it is")


def _run_all_hooks() -> None:
    run: Any = Scope._run_hooks
    _replace(Scope, "_run_hooks", lambda scope, outcome: run(scope, "commit"))


def _keep_hooks_of_savepoints() -> None:
    _replace(Scope, "drop_hooks", lambda scope, savepoint: None)


def _run_no_hooks() -> None:
    _replace(Scope, "_run_hooks", lambda scope, outcome: setattr(scope, "_hooks", ()))


def _commit_first_session() -> None:
    commit: Any = Commit

    def commit_first(sessions: dict[Any, Session], *, final: bool) -> Commit:
        first: Commit = commit(dict(list(sessions.items())[:1]), final=final)
        return first

    _replace(_outcome, "Commit", commit_first)


def _undo_inner_blocks() -> None:
    enter: Any = session_scope.__enter__

    def enter_doomed(block: session_scope) -> Scope:
        scope: Scope = enter(block)
        scope.doom()
        return scope

    _replace(session_scope, "__enter__", enter_doomed)


CHANGES: dict[str, Callable[[], None]] = {
    "commit after the last block": _count_no_bytes,
    "no refusal of aborted transactions": _refuse_no_aborted,
    "no refusal of discarded work": _refuse_no_discarded,
    "an unknown outcome called a rollback": _call_unknown_a_rollback,
    "a retry of everything": _retry_everything,
    "hooks of everything": _run_all_hooks,
    "hooks of savepoints": _keep_hooks_of_savepoints,
    "no hooks": _run_no_hooks,
    "one database of two": _commit_first_session,
    "inner blocks undone": _undo_inner_blocks,
}


# -- what stands in for the middleware ------------------------------------------------------------


def mounts(
    name: str, views: Views, bank: Registry, branch: Registry
) -> dict[str, WSGIApplication]:
    """Return what stands in for the package's middleware in this process."""
    session = scoped_session(sessionmaker(bank.session_factory.kw["bind"]))
    app = views(bank, branch)
    every: dict[str, Callable[[], WSGIApplication]] = {
        "after_request": lambda: AfterRequest(views(session, session), session),
        "commit in close()": lambda: CommitInClose(views(session, session), session),
        'commit_on="close"': lambda: SessionMiddleware(app, bank, branch, commit_on="close"),
        "no veto": lambda: SessionMiddleware(app, bank, branch, commit_veto=None),
    }
    if name == "requests kept":
        kept = SessionMiddleware(Keeping(app), bank, branch)
        return {"plain": kept, "retry": RetryMiddleware(kept)}
    return {"plain": every[name]()} if name in every else {}


class AfterRequest:
    """What the documentation of many frameworks shows."""

    def __init__(self, app: WSGIApplication, session: Registry) -> None:
        self.app = app
        self.session = session

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Body:
        try:
            body = self.app(environ, start_response)
            self.session.commit()
            return body
        except BaseException:
            self.session.rollback()
            raise
        finally:
            self.session.remove()


class CommitInClose:
    """A commit as late as possible: the client has its response by then."""

    def __init__(self, app: WSGIApplication, session: Registry) -> None:
        self.app = app
        self.session = session

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Body:
        try:
            body = self.app(environ, start_response)
        except BaseException:
            self.session.remove()
            raise
        return Closing(body, self.session)


class Closing:
    """The body of a response, with a commit at its end."""

    def __init__(self, body: Body, session: Registry) -> None:
        self.body = body
        self.session = session

    def __iter__(self) -> Iterator[bytes]:
        yield from self.body

    def close(self) -> None:
        """Commit and remove."""
        close: Any = getattr(self.body, "close", None)
        if close is not None:
            close()
        try:
            self.session.commit()
        finally:
            self.session.remove()


class Keeping:
    """A cache without a limit."""

    def __init__(self, app: WSGIApplication) -> None:
        self.app = app
        self.kept: list[WSGIEnvironment] = []

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Body:
        self.kept.append({**environ, "wsgi_dbsession.scope": None})
        return self.app(environ, start_response)
