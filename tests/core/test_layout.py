"""The modules keep to their floors; read from their imports, not from what anyone believes."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = "wsgi_dbsession"
FLOORS = {
    "_driver": 0,
    "_fork": 0,
    "_place": 0,
    "_report": 0,
    "_start": 0,
    "_step": 0,
    "_version": 0,
    "_hooks": 1,
    "_pooler": 1,
    "_spoiled": 1,
    "_transaction": 2,
    "_observed": 3,
    "_released": 3,
    "_outcome": 4,
    "_scope": 5,
    "_moment": 6,
    "_registry": 6,
    "_block": 7,
    "_response": 7,
    "_middleware": 8,
    # An extra may be a package, with floors of its own.
    "retry._body": 9,
    "retry._codes": 9,
    "retry._drivers": 9,
    "retry._attempt": 10,
    "retry._listeners": 11,
    "retry._observer": 11,
    "retry._policy": 11,
    "retry._call": 12,
    "retry._request": 12,
    "retry._middleware": 13,
    "testing._statements": 9,
    "testing._outer": 9,
    "testing._deferred": 9,
    "testing._place": 9,
    "testing._outcomes": 10,
    "testing._savepoints": 10,
    "testing._settings": 11,
    "testing._loss": 11,
    "testing._account": 12,
    "testing._shared": 13,
    "testing._engine": 14,
    "testing._isolation": 16,
    "testing._outsiders": 15,
    "idempotency._problem": 9,
    "idempotency._table": 9,
    "idempotency._request": 10,
    "idempotency._rows": 10,
    "idempotency._record": 12,
    "idempotency._replay": 11,
    "idempotency._middleware": 13,
    "idempotency._row": 11,
    "idempotency._written": 9,
    "replica._position": 9,
    "replica._read_only": 9,
    "replica._routing": 9,
    "replica._commit": 10,
    "replica._requests": 11,
    "replica._replicas": 12,
    "watch._line": 9,
    "watch._page": 9,
    "watch._records": 9,
    "watch._statement": 9,
    "watch._threads": 9,
    "watch._board": 10,
    "watch._holder": 10,
    "watch._show": 11,
    "watch._guard": 12,
    "watch._account": 13,
    "watch._pool": 14,
    "watch._watch": 15,
}
# Known to type checkers without being installed.
TYPING_ONLY = {"_typeshed", "typing_extensions"}


class Import(NamedTuple):
    """One imported module: ours by its name inside the package (``""`` is the façade)."""

    target: str
    ours: bool
    line: int
    in_function: bool
    type_checking: bool


class Imports(ast.NodeVisitor):
    """Collects every import of a module, and where it stands."""

    def __init__(self, module: str, modules: set[str]) -> None:
        self.found: list[Import] = []
        self._package = f"{PACKAGE}.{module}".split(".")[:-1]
        self._modules = modules
        self._in_function = False
        self._type_checking = False

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        outer, self._in_function = self._in_function, True
        self.generic_visit(node)
        self._in_function = outer

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self.visit_FunctionDef(node)

    def visit_If(self, node: ast.If) -> None:
        outer = self._type_checking
        self._type_checking = outer or ast.unparse(node.test).split(".")[-1] == "TYPE_CHECKING"
        for statement in node.body:
            self.visit(statement)
        self._type_checking = outer
        for statement in node.orelse:
            self.visit(statement)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = self._package[: len(self._package) - node.level + 1] if node.level else []
        source = ".".join([*base, *([node.module] if node.module else [])])
        for alias in node.names:
            # "from package import module" imports that module, not the façade.
            module = f"{source}.{alias.name}"
            is_module = module.removeprefix(f"{PACKAGE}.") in self._modules
            self._add(module if is_module else source, node.lineno)

    def _add(self, name: str, line: int) -> None:
        top, _, rest = name.partition(".")
        ours = top == PACKAGE
        where = (line, self._in_function, self._type_checking)
        self.found.append(Import(rest if ours else top, ours, *where))


def is_private(module: str) -> bool:
    return any(part.startswith("_") for part in module.split("."))


def broken_import_rules(sources: dict[str, str]) -> list[str]:
    """Return what is wrong with the imports of a package, given as module names and sources."""
    modules = set(sources)
    wrong = [
        f"{module} has no floor: add it to FLOORS, and to the design"
        for module in sources
        if is_private(module) and module not in FLOORS
    ]
    for module, source in sources.items():
        imports = Imports(module, modules)
        imports.visit(ast.parse(source))
        wrong += [
            f"{module or '__init__'}:{each.line}: {reason}"
            for each in imports.found
            if (reason := _reason_against(module, each))
        ]
    return wrong


def _reason_against(module: str, each: Import) -> str | None:
    if each.in_function:
        return "an import inside a function"
    if each.ours:
        if not module and not is_private(each.target):
            return f"the façade imports {each.target or 'itself'}, which is not private"
        if is_private(module):
            if not is_private(each.target):
                return f"a private module imports {each.target or 'the façade'}, a public one"
            if FLOORS.get(each.target, 99) >= FLOORS.get(module, -1):
                return f"imports {each.target}, which is not on a floor below"
        elif not is_private(each.target) and each.target.split(".")[0] not in {
            "",
            module.split(".")[0],
        }:
            return f"an extra imports {each.target}, another extra"
    elif not module or is_private(module):
        allowed = sys.stdlib_module_names | {"sqlalchemy"}
        if each.type_checking:
            allowed |= TYPING_ONLY
        if each.target not in allowed:
            return f"the core imports {each.target}: neither standard library nor SQLAlchemy"
    return None


def broken_facade_rules(source: str) -> list[str]:
    """Return what an ``__init__`` does beyond re-exporting names in a sorted ``__all__``."""
    wrong: list[str] = []
    imported: list[str] = []
    exported: list[str] | None = None
    for position, node in enumerate(ast.parse(source).body):
        match node:
            case ast.Expr(ast.Constant(str())) if position == 0:
                pass
            case ast.ImportFrom(module="__future__"):
                pass
            case ast.ImportFrom(names=names):
                imported += [alias.asname or alias.name for alias in names]
            case ast.Assign([ast.Name("__all__")], ast.List(elements)):
                exported = [element.value for element in elements]  # type: ignore[attr-defined]
            case _:
                wrong.append(f"__init__:{node.lineno}: does more than re-export")
    if sorted(imported) != (exported or []):
        wrong.append(f"__all__ is not the sorted list of what is imported: {sorted(imported)}")
    return wrong


def sources_of_the_package() -> dict[str, str]:
    directory = Path(__file__).parents[2] / PACKAGE
    found: dict[str, str] = {}
    for path in sorted(directory.rglob("*.py")):
        name = ".".join(path.relative_to(directory).with_suffix("").parts)
        found[name.removesuffix("__init__").removesuffix(".")] = path.read_text(encoding="utf-8")
    return found


def test_modules_import_from_floors_below_only() -> None:
    """No module of the package breaks a rule about imports."""
    assert broken_import_rules(sources_of_the_package()) == []


def test_the_facade_re_exports_and_does_nothing_else() -> None:
    """The package's ``__init__`` is a docstring, imports, and a sorted ``__all__``."""
    assert broken_facade_rules(sources_of_the_package()[""]) == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        pytest.param("_scope", "from . import retry", "a public one", id="private imports extra"),
        pytest.param(
            "_scope", "from .retry import x", "a public one", id="private imports from an extra"
        ),
        pytest.param(
            "_scope",
            "import wsgi_dbsession.retry",
            "a public one",
            id="the same, absolutely",
        ),
        pytest.param(
            "_scope", "from . import Scope", "the façade", id="private imports the façade"
        ),
        pytest.param(
            "_scope",
            "from wsgi_dbsession import Scope",
            "the façade",
            id="private imports the façade absolutely",
        ),
        pytest.param("_scope", "from ._response import x", "floor below", id="import upwards"),
        pytest.param("_fork", "from . import _fork", "floor below", id="import on the same floor"),
        pytest.param("_scope", "from . import _scope", "floor below", id="import of itself"),
        pytest.param(
            "_scope",
            "if TYPE_CHECKING:\n    from ._response import x",
            "floor below",
            id="import upwards for types",
        ),
        pytest.param("_scope", "import flask.json", "core imports flask", id="core imports Flask"),
        pytest.param(
            "_scope", "import typing_extensions", "core imports", id="typing only, at run time"
        ),
        pytest.param(
            "_scope",
            "if not TYPE_CHECKING:\n    import _typeshed",
            "core imports",
            id="not for types",
        ),
        pytest.param(
            "_scope",
            "if TYPE_CHECKING:\n    pass\nelse:\n    import _typeshed",
            "core imports",
            id="else of the block for types",
        ),
        pytest.param(
            "_scope",
            "class A:\n    async def f(self):\n        import os",
            "inside a function",
            id="import inside a method",
        ),
        pytest.param(
            "retry",
            "def f():\n    if TYPE_CHECKING:\n        import os",
            "inside a function",
            id="import for types inside a function",
        ),
        pytest.param("retry", "from . import replica", "another extra", id="extra imports extra"),
        pytest.param(
            "retry", "from wsgi_dbsession.replica import x", "another extra", id="absolutely"
        ),
        pytest.param("", "from .retry import x", "not private", id="façade imports extra"),
        pytest.param("_util", "", "has no floor", id="private module without a floor"),
    ],
)
def test_a_broken_import_rule_is_found(module: str, source: str, complaint: str) -> None:
    """Each rule has a small package that breaks it, and only it."""
    package = dict.fromkeys(["", *FLOORS, "retry", "replica"], "")

    (found,) = broken_import_rules({**package, module: source})

    assert complaint in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        pytest.param("_response", "from ._scope import Scope", id="from a floor below"),
        pytest.param("_middleware", "from . import _transaction", id="from far below"),
        pytest.param("_scope", "import os.path\nfrom sqlalchemy.orm import Session", id="allowed"),
        pytest.param(
            "_scope", "if TYPE_CHECKING:\n    from _typeshed.wsgi import X", id="WSGI types"
        ),
        pytest.param("retry", "import flask\nfrom ._scope import Scope", id="extra"),
        pytest.param("retry", "from . import Scope", id="extra imports the façade"),
        pytest.param("", "from ._scope import Scope", id="façade imports the core"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    """The rules do not forbid what the design asks for."""
    package = dict.fromkeys(["", *FLOORS, "retry", "replica"], "")

    assert broken_import_rules({**package, module: source}) == []


@pytest.mark.parametrize(
    ("source", "number"),
    [
        pytest.param('"""Doc."""\nfrom ._a import B, a\n\n__all__ = ["B", "a"]', 0, id="sound"),
        pytest.param('from ._a import B, a\n__all__ = ["a", "B"]', 1, id="not sorted"),
        pytest.param('from ._a import B, a\n__all__ = ["B"]', 1, id="not everything"),
        pytest.param("from ._a import B", 1, id="no list"),
        pytest.param('from ._a import B\n__all__ = ["B"]\nB.x = 1', 1, id="assigns"),
        pytest.param('import logging\nfrom ._a import B\n__all__ = ["B"]', 1, id="imports"),
        pytest.param("def f() -> None: ...", 1, id="defines"),
    ],
)
def test_a_facade_that_does_more_is_found(source: str, number: int) -> None:
    """The façade's rules are checked, too."""
    assert len(broken_facade_rules(source)) == number
