"""Part 0, continued: what the rules of the core cost, by taking them out one at a time."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.orm import configure_mappers
from sqlalchemy.pool import Pool

from benchmarks import instructions, report
from benchmarks.applications.common import BY_HAND, NONE, OURS
from benchmarks.editions import ROOT
from wsgi_dbsession import _driver, _fork, _outcome, _registry, _step, _transaction

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ALL = "all of these"
PATHS = {"/": NONE, "/select": BY_HAND, "/insert": BY_HAND}
_FRAMEWORK = "bare WSGI"


def _replace(owner: object, name: str, value: object) -> None:
    setattr(owner, name, value)


def ask_nothing() -> None:
    _replace(_transaction, "_refuse_spoiled", _transaction.connections)


def trust_the_pool() -> None:
    for module in (_fork, _driver):
        event.remove(Pool, "checkout", module._on_checkout)


def ignore_sessions() -> None:
    usual = event.listen

    def listen(target: Any, name: str, *arguments: Any, **options: Any) -> None:
        if name == "after_commit":  # without it, no commit would be known
            usual(target, name, *arguments, **options)

    _replace(event, "listen", listen)
    del _transaction.AdoptedSession.close


def stay_in_one_context() -> None:
    class Context:
        def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
            return function(*arguments)

    context = Context()
    for module in (_registry, _outcome):
        _replace(module, "copy_context", lambda: context)
    _replace(_step.Step, "own", lambda _, given: given)


def flush_with_the_commit() -> None:
    _replace(_transaction.Commit, "_flush", lambda commit: list(commit._sessions.values()))


RULES: dict[str, Callable[[], None]] = {
    "the driver is asked whether the transaction can be committed": ask_nothing,
    "the pool is watched for forks, and for changes of SQLite": trust_the_pool,
    "a Session that is closed or kept is noticed": ignore_sessions,
    "the outcome runs in the context of the application": stay_in_one_context,
    "each Session is flushed before the first is committed": flush_with_the_commit,
}


def take_out_all() -> None:
    for take_out in RULES.values():
        take_out()


def measure(urls: dict[str, str], *, quick: bool) -> dict[str, Any]:
    """Count the requests with each rule taken out."""
    try:
        arguments = ["--quick"] if quick else []
        totals = instructions.thousands("benchmarks.rules", *arguments, package=ROOT)
    except instructions.ValgrindError as error:
        report.warn(f"no instructions are counted: {error}")
        return {"skipped": str(error)}
    return {"found": [[*names, found] for names, found in totals.items()]}


def render(results: dict[str, Any], directory: Path) -> str:
    """Write what each rule costs, and what remains without them."""
    parts = [
        "## What the rules cost\n",
        report.prose("""
            The same requests with a rule of the core taken out. Thousand instructions that it
            costs; then what a request needs more than its base, with all rules and without.
        """),
    ]
    if "found" not in results:
        return "\n".join([*parts, f"**Not counted: {results['skipped']}.**\n"])
    found = {(path, name): number for path, name, number in results["found"]}
    paths = [path for path in PATHS if (path, OURS) in found]
    rows = [
        [name, *(f"{found[path, OURS] - found[path, name]:.1f}" for path in paths)]
        for name in (*RULES, ALL)
    ]
    for name, who in ((OURS, "more than the base, with all rules"), (ALL, "without")):
        more = (found[path, name] - found[path, PATHS[path]] for path in paths)
        rows.append([f"**{who}**", *(f"**{number:+.1f}**" for number in more)])
    heads = ["", *("no Session, list", "SELECT, list", "INSERT, list")[: len(paths)]]
    return "\n".join([*parts, report.table(heads, rows)])


def main() -> None:
    configure_mappers()
    for path, base in list(PATHS.items())[: 1 if "--quick" in sys.argv else None]:
        peers: dict[str, tuple[str, Callable[[], None] | None]] = {
            base: (base, None),
            OURS: (OURS, None),
            **{name: (OURS, take_out) for name, take_out in RULES.items()},
            ALL: (OURS, take_out_all),
        }
        for name, (peer, prepare) in peers.items():
            pids = [
                instructions.in_child(_FRAMEWORK, peer, path, many, prepare)
                for many in (0, instructions.REQUESTS)
            ]
            print(path, name, *pids, sep="\t", flush=True)


if __name__ == "__main__":
    main()
