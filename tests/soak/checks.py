"""What must be true: a comparison of what the clients were told with the journal and the books."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from tests.soak.databases import ACCOUNTS, START
from tests.soak.history import Violation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.soak.history import Books, Journal, Transfer


def audit(
    transfers: Sequence[Transfer], journal: Journal, books: Books, deaths: Sequence[float] = ()
) -> list[Violation]:
    """Compare, and return what is wrong.

    :param deaths: the moments at which a process of the application was killed: what it had
        committed may have run no hook, and its refusals are logged nowhere.
    """
    return [*Audit(transfers, journal, books, deaths).run(), *audit_sums(books)]


def audit_sums(books: Books) -> list[Violation]:
    """Compare the balances with the entries."""
    expected = dict.fromkeys(range(ACCOUNTS), START)
    for entry in books.entries:
        expected[entry.source] -= entry.amount
        expected[entry.target] += entry.amount
    return [
        Violation("balance without its transfers", f"account {account}", [f"{balance} != {must}"])
        for account, must in expected.items()
        if (balance := books.balances.get(account)) != must
    ]


class Audit:
    """One comparison."""

    def __init__(
        self,
        transfers: Sequence[Transfer],
        journal: Journal,
        books: Books,
        deaths: Sequence[float],
    ) -> None:
        self.transfers = transfers
        self.journal = journal
        self.books = books
        self.deaths = deaths
        self.applied = Counter(entry.token for entry in books.entries)
        self.found: list[Violation] = []

    def run(self) -> list[Violation]:
        """Look at each transfer."""
        for transfer in self.transfers:
            self._check_told(transfer)
            self._check_hooks(transfer)
            self._check_other_tables(transfer)
        known = {transfer.token for transfer in self.transfers}
        for token in self.applied:
            if token not in known:
                self.found.append(Violation("transfer that no client has sent", token, []))
        return self.found

    def _violate(self, kind: str, transfer: Transfer) -> None:
        token = transfer.token
        history = [
            transfer.shape,
            f"told {transfer.told} {transfer.status or ''}, sent {transfer.tries} times",
            f"in the books {self.applied[token]} times, in the branch {self.books.branch[token]}",
            *self.journal.text(token),
        ]
        self.found.append(Violation(kind, token, history))

    def _check_told(self, transfer: Transfer) -> None:
        times = self.applied[transfer.token]
        if times > 1:
            self._violate("transfer twice", transfer)
        if transfer.told == "success" and not times:
            self._violate("success without its transfer", transfer)
        if transfer.told == "unsent" and not transfer.tries and times:
            self._violate("transfer that was never sent", transfer)
        if transfer.repeats:
            if not times or not (transfer.told == "success" or transfer.took_effect):
                self._violate("repeated until it had an answer, and no transfer", transfer)
        elif transfer.told == "refusal" and times:
            token = transfer.token
            if not self.journal.is_open(token) and not self.journal.is_told(token):
                self._violate("refusal, but the transfer is there", transfer)

    def _check_hooks(self, transfer: Transfer) -> None:
        token, times = transfer.token, self.applied[transfer.token]
        ran = self.journal.count(token, "hook", "commit")
        if ran and not times:
            self._violate("hook of a commit that did not take place", transfer)
        if ran > 1:
            self._violate("hook twice", transfer)
        if self.journal.count(token, "hook", "dropped"):
            self._violate("hook of a savepoint that was rolled back", transfer)
        if not times or ran or self.journal.is_open(token) or self._saw_death(transfer):
            return
        if self.journal.count(token, "hook", "rollback"):
            self._violate("hook of a rollback that did not take place", transfer)
        else:
            self._violate("commit without its hook", transfer)

    def _check_other_tables(self, transfer: Transfer) -> None:
        token, times = transfer.token, self.applied[transfer.token]
        if transfer.work == "two registries" and self.books.branch[token] != times:
            known = self.journal.is_open(token) or self._saw_death(transfer)
            if transfer.told == "success" or transfer.mount == "two-phase" or not known:
                self._violate("in one database only", transfer)
        if transfer.work == "inner block" and times and not self.books.attempts[token]:
            self._violate("inner block lost", transfer)

    def _saw_death(self, transfer: Transfer) -> bool:
        # A client that hangs up does not know for how long the server goes on with its request.
        last = transfer.ended + (20 if transfer.hung_up else 1)
        return any(transfer.begun <= moment <= last for moment in self.deaths)
