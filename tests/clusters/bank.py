"""A bank of transfers: an application, its clients, and what must be true of its books.

Each transfer has a token. It writes one entry and changes two balances, in one transaction. The
clients remember what each of them was told; afterwards the books are compared with that.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from sqlalchemy import text
from typing_extensions import Self

from tests.support.wsgi import Server, make_environ
from wsgi_dbsession import Scope, SessionMiddleware, current_scope
from wsgi_dbsession.retry import RetryMiddleware

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from sqlalchemy.orm import Session, scoped_session

    Fetch = Callable[[str], list[tuple[Any, ...]]]

ACKNOWLEDGED, ROLLED_BACK, UNKNOWN = "acknowledged", "rolled back", "unknown"
START = 1000


def protect(app: SessionMiddleware, attempts: int) -> RetryMiddleware:
    """Put the retry around it; connects are retried too, and the raw errors of pg8000's socket."""
    return RetryMiddleware(
        app, attempts=attempts, timeout=20, backoff_max=0.2, retry_connect=True, on=OSError
    )


class Bank:
    """The application.

    :param registry: The session registry of its database.
    :param accounts: How many accounts; the fewer, the more races.
    :param reads_first: Whether a transfer reads a balance and writes a new one, in place of
        letting the database add.
    :param attempts: How often a transfer is tried at most; 1 is without the retry.
    """

    def __init__(
        self,
        registry: scoped_session[Session],
        *,
        accounts: int = 10,
        reads_first: bool = False,
        attempts: int = 1,
    ) -> None:
        self.registry = registry
        self.accounts = accounts
        self.reads_first = reads_first
        self.scopes: dict[str, Scope] = {}
        self.app: WSGIApplication
        middleware = SessionMiddleware(self._respond, registry)
        if attempts == 1:
            self.app = middleware
        else:
            self.app = protect(middleware, attempts)

    def open(self, fetch: Fetch) -> None:
        """Make its tables, empty but for the accounts."""
        for table in ("account", "entry"):
            fetch(f"DROP TABLE IF EXISTS {table}")
        fetch("CREATE TABLE account (id int PRIMARY KEY, balance int NOT NULL)")
        fetch(
            "CREATE TABLE entry (id varchar(40) PRIMARY KEY, token varchar(40) NOT NULL,"
            " source int NOT NULL, target int NOT NULL, amount int NOT NULL)"
        )
        values = ", ".join(f"({number}, {START})" for number in range(self.accounts))
        fetch(f"INSERT INTO account VALUES {values}")

    def _respond(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        query = parse_qs(environ["QUERY_STRING"])
        token, source, target, amount = (query[name][0] for name in ("t", "from", "to", "n"))
        self.scopes[token] = current_scope()
        self._transfer(token, int(source), int(target), int(amount))
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "4")])
        return [b"done"]

    def _transfer(self, token: str, source: int, target: int, amount: int) -> None:
        # Each attempt has an entry of its own, so that two of them would be seen.
        self.registry.execute(
            text("INSERT INTO entry VALUES (:id, :token, :source, :target, :amount)"),
            {
                "id": f"{token}.{next(COUNTER)}",
                "token": token,
                "source": source,
                "target": target,
                "amount": amount,
            },
        )
        for account, change in ((source, -amount), (target, amount)):
            if self.reads_first:
                balance = self.registry.scalar(
                    text("SELECT balance FROM account WHERE id = :id"), {"id": account}
                )
                assert balance is not None
                self.registry.execute(
                    text("UPDATE account SET balance = :balance WHERE id = :id"),
                    {"balance": balance + change, "id": account},
                )
            else:
                self.registry.execute(
                    text("UPDATE account SET balance = balance + :change WHERE id = :id"),
                    {"change": change, "id": account},
                )


COUNTER = itertools.count()


@dataclass
class Load:
    """Clients that send transfers until the block ends, and what they were told.

    :param banks: The applications, one for each client in turn: one bank in several processes.
    """

    banks: list[Bank]
    clients: int = 8
    told: dict[str, str] = field(default_factory=dict)
    errors: Counter[str] = field(default_factory=Counter)
    crashes: list[BaseException] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._end = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=[self.banks[number % len(self.banks)], number])
            for number in range(self.clients)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(90)
        if error is None:
            assert not any(thread.is_alive() for thread in self._threads), "a client hangs"
            assert not self.crashes, self.crashes

    def count(self, what: str) -> int:
        """Return how many clients' transfers were told so."""
        return Counter(self.told.values())[what]

    def run_until(self, transfers: int, *, timeout: float = 60) -> None:
        """Wait until so many more transfers have been acknowledged."""
        goal = self.count(ACKNOWLEDGED) + transfers
        deadline = time.monotonic() + timeout
        while (done := self.count(ACKNOWLEDGED)) < goal:
            assert not self.crashes, self.crashes
            assert time.monotonic() < deadline, f"{done} of {goal}; {self.errors}"
            time.sleep(0.01)

    def _run(self, bank: Bank, number: int) -> None:
        chance = random.Random(number)
        try:
            for turn in itertools.count():
                if self._end.is_set():
                    return
                self._transfer(bank, f"{number}-{turn}", chance)
        except BaseException as error:
            self.crashes.append(error)
            raise

    def _transfer(self, bank: Bank, token: str, chance: random.Random) -> None:
        source, target = chance.sample(range(bank.accounts), 2)
        query = f"t={token}&from={source}&to={target}&n={chance.randint(1, 9)}"
        server = Server()
        error: Exception | None = None
        try:
            # Not through wsgiref's loop, which is silent about a BrokenPipeError of the driver.
            server.run(bank.app, make_environ("POST", "/transfer", QUERY_STRING=query))
        except Exception as caught:
            error = caught
        scope = bank.scopes.pop(token)
        if error is None and (server.status, server.body) == ("200 OK", b"done"):
            self.told[token] = ACKNOWLEDGED
        else:
            self.told[token] = UNKNOWN if scope.reason == UNKNOWN else ROLLED_BACK
            self.errors[describe(error) if error else server.status] += 1


def describe(error: BaseException) -> str:
    """Return an error's class, and its code or text."""
    original = getattr(error, "orig", None) or error
    code = original.args[0] if original.args and isinstance(original.args[0], int) else None
    code = code or getattr(original, "sqlstate", None) or getattr(original, "pgcode", None)
    during = "a statement" if getattr(error, "statement", None) else "COMMIT or connect"
    return f"{type(original).__name__} {code or repr(str(original)[:60])} at {during}"


def audit(bank: Bank, load: Load, fetch: Fetch) -> None:
    """Compare the books with what the clients were told; raise where they differ."""
    print(f"{len(load.told)} transfers: {dict(Counter(load.told.values()))}, {dict(load.errors)}")
    applied = Counter(token for (token,) in fetch("SELECT token FROM entry"))
    told = load.told
    lost = [token for token in told if told[token] == ACKNOWLEDGED and not applied[token]]
    false = [token for token in told if told[token] == ROLLED_BACK and applied[token]]
    twice = [token for token, times in applied.items() if times > 1]
    assert (lost, false, twice) == ([], [], []), f"lost, false, twice; {load.errors}"
    assert set(applied) <= set(told)

    expected = dict.fromkeys(range(bank.accounts), START)
    for source, target, amount in fetch("SELECT source, target, amount FROM entry"):
        expected[source] -= amount
        expected[target] += amount
    balances: dict[int, int] = dict(fetch("SELECT id, balance FROM account"))
    assert balances == expected, "updates were lost"
