"""Every message of the package, read from its source: exceptions, warnings, log lines.

``python -m tests.docs.messages`` writes them into docs/troubleshooting.md; a test compares.
"""

from __future__ import annotations

import ast
import re
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import wsgi_dbsession
from tests.docs.pages import DOCS
from tests.frameworks.tables import write

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TypeAlias

PACKAGE = Path(wsgi_dbsession.__file__).parent
DOCUMENT = DOCS / "troubleshooting.md"
LEVELS = ("debug", "info", "warning", "error", "exception")
GAP = "…"


class Message(NamedTuple):
    """A message, its variable parts replaced by an ellipsis."""

    text: str
    kind: str
    """The exception's class, or the level of the log."""
    module: str


#: what a name may be where the reader is
Names: TypeAlias = "dict[str, frozenset[str]]"


class Reader:
    """Collects the messages of a module: follows its statements with what each name may be."""

    def __init__(self, module: str, tree: ast.Module) -> None:
        self.found: set[Message] = set()
        self._module = module
        self._read(tree.body, {})

    def _read(self, statements: list[ast.stmt], names: Names) -> bool:
        """Read a block, and change `names` to what they are after it.

        :return: whether what follows the block is reached from its end.
        """
        for statement in statements:
            if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
                self._read(statement.body, dict(names))
                continue
            blocks = [
                block
                for field in ("body", "orelse", "finalbody")
                if (block := getattr(statement, field, None))
            ]
            blocks += [handler.body for handler in getattr(statement, "handlers", [])]
            if blocks:
                self._branch(statement, blocks, names)
                continue
            self._find(statement, names)
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                texts = frozenset(self._texts(statement.value, names))
                names[statement.targets[0].id] = texts
            if isinstance(statement, (ast.Raise, ast.Return)):
                return False
        return True

    def _branch(self, statement: ast.stmt, blocks: list[list[ast.stmt]], names: Names) -> None:
        for field in ("test", "iter", "items"):
            value = getattr(statement, field, None)
            for node in value if isinstance(value, list) else [value]:
                if node is not None:
                    self._find(node, names)
        before = dict(names)
        for block in blocks:
            inside = dict(before)
            if self._read(block, inside):
                for name, texts in inside.items():
                    names[name] = names.get(name, frozenset()) | texts

    def _find(self, tree: ast.AST, names: Names) -> None:
        for node in ast.walk(tree):
            kind = kind_of(node)
            if kind is not None and isinstance(node, ast.Call) and node.args:
                for text in self._texts(node.args[0], names):
                    words = re.sub(rf"%[sdr]|{GAP}({GAP}|\s)*{GAP}", GAP, text).strip()
                    if re.search("[a-z]{3}", words):
                        self.found.add(Message(words, kind, self._module))

    def _texts(self, node: ast.expr, names: Names) -> Iterator[str]:
        """Return what an expression may be, its variable parts as gaps."""
        match node:
            case ast.Constant(value=str(text)):
                yield text
            case ast.JoinedStr(values=parts):
                choices = [list(self._texts(part, names)) for part in parts]
                yield from map("".join, product(*choices))
            case ast.FormattedValue(value=ast.Name() as name, conversion=-1, format_spec=None):
                yield from self._texts(name, names)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                sides = self._texts(left, names), self._texts(right, names)
                yield from map("".join, product(*sides))
            case ast.IfExp(body=body, orelse=orelse):
                yield from self._texts(body, names)
                yield from self._texts(orelse, names)
            case ast.Name(id=name):
                yield from sorted(names.get(name, {GAP}))
            case _:
                yield GAP


def kind_of(node: ast.AST) -> str | None:
    """Return what a call makes of its first argument, if that is a message."""
    if not isinstance(node, ast.Call):
        return None
    match node.func:
        case ast.Name(id=name) | ast.Attribute(attr=name) if re.search("(Error|Warning)$", name):
            return name
        case ast.Attribute(value=ast.Name(id="log"), attr=level) if level in LEVELS:
            return "ERROR" if level == "exception" else level.upper()
        case ast.Attribute(value=ast.Name(id="warnings"), attr="warn"):
            category = node.args[1] if len(node.args) > 1 else None
            return category.id if isinstance(category, ast.Name) else "UserWarning"
    return None


def read_messages(source: str, module: str) -> set[Message]:
    """Return the messages of a module, given its source."""
    return Reader(module, ast.parse(source)).found


def all_messages() -> list[Message]:
    """Return the messages of the package, in the order of their words."""
    found: set[Message] = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found |= read_messages(path.read_text(encoding="utf-8"), module)
    return sorted(found, key=lambda each: (each.text.strip(GAP + ": ").lower(), *each))


def rows() -> list[list[str]]:
    """Return the rows of the table, the header first."""
    table = [["message", "kind"]]
    for text, kind, _ in all_messages():
        row = [f"{text.replace('|', ' or ')}", f"`{kind}`"]
        if row not in table:
            table.append(row)
    return table


def main() -> None:
    """Write the table into the document."""
    document = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(write(document, {"messages": rows()}), encoding="utf-8")


if __name__ == "__main__":
    main()
