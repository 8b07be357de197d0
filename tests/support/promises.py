"""What the package promises, and the tests that break each promise on purpose.

``python -m tests.support.promises`` writes ``tests/PROMISES.md`` from :data:`PROMISES` and from
what marks the tests: ``@pytest.mark.promise("doom")``, or the same in a module's ``pytestmark``.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = TESTS / "PROMISES.md"

# By part: the name that tests use, and the promise.
PROMISES: dict[str, dict[str, str]] = {
    "The two promises": {
        "no false success": (
            "No client gets a whole, successful response whose transaction did not commit."
        ),
        "no silent loss": "No work is lost in silence.",
    },
    "Which outcome: the first row that holds": {
        "error": "An error of the application, or an interruption, is a rollback.",
        "doom": "A doomed scope is a rollback.",
        "incomplete": "A body that was left incomplete is a rollback.",
        "keep": "A kept scope is a commit in spite of the status.",
        "veto": "A veto, which by default is for 4xx and 5xx, is a rollback.",
        "otherwise": "Everything else is a commit.",
    },
    "What an outcome is": {
        "every change": "Every change counts, by the ORM, by Core or as text.",
        "own commits": "What the application committed itself stays committed.",
        "several registries": "All Sessions are flushed before the first is committed.",
        "two-phase": "Two-phase Sessions are prepared before any Session is committed.",
        "discarded": "A commit is refused where the application discarded what it had written.",
        "aborted": "What the database has aborted is not called a commit.",
        "truth": "A failed commit says whether it was rolled back, unknown, committed or partly.",
        "context": "Flush, commit and hooks see the context of the application.",
        "hooks": "Hooks run in order after the outcome; an error in one is logged only.",
        "savepoints": "A hook registered inside of a savepoint is dropped if that is rolled back.",
        "log": "Success logs nothing, and each loss a line.",
    },
    "When: the moment": {
        "headers": 'With "headers" the outcome comes before the first block.',
        "complete": "By default the outcome comes before the client has all of the response.",
        "swallowed": "A failure at the outcome that the application swallows fails the response.",
        "close": 'With "close" the outcome comes when the response is closed.',
        "chosen moment": "The application may choose the moment for each response.",
        "the rest": "What begins after an outcome gets one of its own at the next moment.",
        "no body": "HEAD, 204 and 304 are whole with their headers, so the outcome comes before.",
        "write": "The outcome comes before the write() that completes the body.",
        "finished bodies": "A list, a tuple or a file reaches the server as the same object.",
        "commit_error": "commit_error answers for a failed commit where nothing has been sent.",
        "PEP 3333": "The server and the application notice nothing of the middleware.",
        "first error": "The first error is the one that propagates.",
        "no connection held": "No connection is held while a client reads a finished body.",
    },
    "Scope and Session": {
        "unused": "A request that does not touch the database costs no Session and no connection.",
        "no scope": "Without a scope, asking for a Session fails with an error that says the fix.",
        "constructors": "A wrong argument is refused at once, with the fix in the message.",
        "requests do not meet": "Requests at once have a scope each, wherever their steps run.",
        "threads": "A thread, a greenlet or a late context of the application has no scope.",
        "nested middleware": "Nested middleware within one environ joins the outer scope.",
        "observers": "An observer sees each scope, its outcome and its end, and touches nothing.",
        "in-process requests": "A request made inside of a request has a scope of its own.",
        "not expired": "The commit that ends a scope does not expire objects.",
        "blocks": "session_scope is a unit of work of its own, also inside of another.",
        "released": "In released() no connection is held, and nothing that was written is lost.",
    },
    "Nothing is left behind": {
        "cleanup": "Sessions are removed and connections returned, whatever raises.",
        "unclosed": "An unclosed response leaves nothing.",
        "collector": "A finalizer closes Sessions, and sets no context variable.",
        "interruptions": "A connection that was interrupted in a statement is thrown away.",
        "interrupted lines": "An interruption leaves no scope and no connection, at any line.",
        "forks": "No process uses a connection of its parent, and none ends its parent's work.",
        "dropped connections": "A dropped connection costs one request, and is not lied about.",
    },
    "Retry": {
        "run again": "A request that lost a race runs again, and its client does not notice.",
        "never again": "What may have been committed, or was sent, never runs again.",
        "attempts": "Attempts do not know each other, and each reads the whole body.",
        "jobs": "Work outside of requests runs again by the same rules.",
    },
    "Isolated tests": {
        "nothing remains": "No row remains, and the application does not notice.",
        "as in production": "What fails in production fails in isolation.",
        "leaks": "What a test leaves open fails that test, and names the line.",
        "outcomes": "Each outcome is visible, with its reason.",
    },
    "Everywhere": {
        "servers": "It holds in every server.",
        "frameworks": "It holds in every framework.",
    },
}


def names() -> list[str]:
    """Return the names of all promises."""
    return [name for part in PROMISES.values() for name in part]


def promised(node: ast.expr) -> list[str]:
    """Return the names in a mark, which may be one of a list."""
    if isinstance(node, ast.List):
        return [name for each in node.elts for name in promised(each)]
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.promise":
        return [str(ast.literal_eval(each)) for each in node.args]
    return []


def marks(source: str) -> dict[str, list[str]]:
    """Return the promises of a module, by the name of the test, or ``""`` for all of them."""
    found: dict[str, list[str]] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = [name for each in node.decorator_list for name in promised(each)]
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            found[""] = promised(node.value)
    return found


def read(directory: Path = TESTS) -> dict[str, list[str]]:
    """Return the tests of each promise, as pytest takes them on its command line."""
    tests: defaultdict[str, list[str]] = defaultdict(list)
    for path in sorted(directory.glob("**/test_*.py")):
        module = path.relative_to(directory.parent).as_posix()
        for test, promises in marks(path.read_text()).items():
            for name in promises:
                tests[name].append(f"{module}::{test}" if test else module)
    return dict(tests)


def complaints(tests: dict[str, list[str]]) -> list[str]:
    """Return what is wrong: a promise without a test, or a test of one that does not exist."""
    return [
        *(f"no test breaks {name!r}" for name in names() if not tests.get(name)),
        *(f"{tests[name]} break {name!r}, which is none" for name in tests.keys() - set(names())),
    ]


def page(tests: dict[str, list[str]]) -> str:
    """Return the page."""
    lines = [
        "# Promises",
        "",
        "What the package promises, and the tests that break each promise on purpose.",
        "A module stands for all of its tests.",
        "Written by `make docs-promises` from the marks of the tests; never by hand.",
    ]
    for part, promises in PROMISES.items():
        lines += ["", f"## {part}"]
        for name, sentence in promises.items():
            lines += ["", f"**{sentence}** (`{name}`)", ""]
            lines += [f"- `{test}`" for test in tests.get(name, [])]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    found = read()
    if wrong := complaints(found):
        raise SystemExit("\n".join(wrong))
    PAGE.write_text(page(found))
