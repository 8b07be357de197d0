"""What a request of the bank does to the books, step by step; the wrong ways too.

Each work is a generator of :data:`STEPS` steps, so that a body can be sent in between. A view may
be careless: it swallows an error, or closes the Session. The package refuses to commit that.
"""

from __future__ import annotations

import contextlib
import uuid
from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import Column, Integer, MetaData, Table, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.orm import registry as mapper_registry

from wsgi_dbsession import current_scope, session_scope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Connection
    from sqlalchemy.orm import scoped_session

    Registry = scoped_session[Session]

STEPS = 3
LEAKED: list[Connection] = []


class Order(NamedTuple):
    """A transfer that a client asks for, and where it is written."""

    token: str
    source: int
    target: int
    amount: int
    bank: Registry
    branch: Registry
    write: Callable[[str, str, str], None]


class Marker:
    """A row of the table ``marker``, which has the row 1."""

    def __init__(self, number: int) -> None:
        self.id = number


mapper_registry().map_imperatively(
    Marker, Table("marker", MetaData(), Column("id", Integer, primary_key=True))
)


class ViewError(Exception):
    """The error of a view that fails after its work."""


class Refused(Exception):  # noqa: N818 - it becomes a response, like an exception of a framework
    """A view answers with 409 after its work."""


def enter(order: Order) -> None:
    """Write the entry; each execution has one of its own, so that two of them would be seen."""
    order.bank.execute(
        text("INSERT INTO entry VALUES (:id, :token, :source, :target, :amount)"),
        {
            "id": f"{order.token}.{uuid.uuid4().hex}",
            "token": order.token,
            "source": order.source,
            "target": order.target,
            "amount": order.amount,
        },
    )


def change(order: Order, account: int, amount: int) -> None:
    """Change the balance of an account."""
    order.bank.execute(
        text("UPDATE account SET balance = balance + :amount WHERE id = :id"),
        {"amount": amount, "id": account},
    )


def mark(order: Order) -> None:
    """Insert a row that is there already."""
    order.bank.execute(text("INSERT INTO marker VALUES (1)"))


def transfer(order: Order) -> Iterator[None]:
    """Take from one account, give to the other; races make deadlocks."""
    enter(order)
    yield
    change(order, order.source, -order.amount)
    yield
    change(order, order.target, order.amount)
    yield


def savepoints(order: Order) -> Iterator[None]:
    """Undo a part that fails, hook included, and keep the rest."""
    with order.bank.begin_nested():
        enter(order)
    with contextlib.suppress(DBAPIError), order.bank.begin_nested():
        change(order, order.source, order.amount)
        current_scope().on_commit(order.write, order.token, "hook", "dropped")
        mark(order)
    yield
    with order.bank.begin_nested():
        change(order, order.source, -order.amount)
    yield
    with order.bank.begin_nested():
        change(order, order.target, order.amount)
    yield


def block(order: Order) -> Iterator[None]:
    """Write the attempt in a unit of work of its own, then do the transfer."""
    with session_scope(order.bank, name="attempt"):
        order.bank.execute(text("INSERT INTO attempt VALUES (:token)"), {"token": order.token})
    yield from transfer(order)


def registries(order: Order) -> Iterator[None]:
    """Write the entry into both databases."""
    order.branch.execute(text("INSERT INTO entry VALUES (:token)"), {"token": order.token})
    yield from transfer(order)


def swallowed(order: Order) -> Iterator[None]:
    """Catch the error of a statement without a savepoint, and answer as if nothing had been.

    PostgreSQL has aborted the transaction. MariaDB has not, and keeps the transfer.
    """
    yield from _before_last(order)
    with contextlib.suppress(DBAPIError):
        mark(order)
    yield


def discarded(order: Order) -> Iterator[None]:
    """Close the Session as the teardowns of many tutorials do."""
    yield from _before_last(order)
    order.bank.remove()
    yield


def late_flush(order: Order) -> Iterator[None]:
    """Add an object whose INSERT is sent, and fails, when the outcome comes."""
    yield from _before_last(order)
    order.bank.add(Marker(1))
    yield


def deferred(order: Order) -> Iterator[None]:
    """Violate a constraint that PostgreSQL checks at COMMIT."""
    yield from _before_last(order)
    order.bank.execute(text("INSERT INTO child VALUES (1)"))
    yield


def refused(order: Order) -> Iterator[None]:
    """Do everything, and find out that the answer is no."""
    yield from _before_last(order)
    raise Refused


def failed(order: Order) -> Iterator[None]:
    """Do everything, and fail."""
    yield from _before_last(order)
    raise ViewError


def doomed(order: Order) -> Iterator[None]:
    """Do everything, doom the scope, and answer with 409."""
    yield from _before_last(order)
    current_scope().doom()
    raise Refused


def leak(order: Order) -> Iterator[None]:
    """Keep a connection: only a control does."""
    LEAKED.append(Session(order.bank.get_bind()).connection())
    yield from transfer(order)


def halfway(order: Order) -> Iterator[None]:
    """Commit in the midst: only a control does, because it breaks the sums by itself."""
    enter(order)
    change(order, order.source, -order.amount)
    order.bank.commit()
    yield
    change(order, order.target, order.amount)
    yield
    yield


def _before_last(order: Order) -> Iterator[None]:
    steps = transfer(order)
    for _ in range(STEPS - 1):
        yield next(steps)
    next(steps)


WORKS: dict[str, Callable[[Order], Iterator[None]]] = {
    "transfer": transfer,
    "savepoints": savepoints,
    "inner block": block,
    "two registries": registries,
    "swallowed error": swallowed,
    "closed Session": discarded,
    "late flush": late_flush,
    "deferred constraint": deferred,
    "veto": refused,
    "error": failed,
    "doom": doomed,
    "commit half-way": halfway,
    "connection kept": leak,
}
