"""The core can be read in one sitting, each file on a few screens, each function on one."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

import pytest

from tests.core.test_layout import is_private, sources_of_the_package

# Of code, in all files of the core. The design hoped for 800, but its rules are many: what drivers
# tell, the truth about a failure, discards, released connections, poolers, the cases of PEP 3333.
CORE_LINES = 1810
FILE_LINES = 320  # of the package, in all
FUNCTION_LINES = 45  # without its docstring
TEST_FILE_LINES = 600

_NO_CODE = {
    tokenize.COMMENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
    tokenize.INDENT,
    tokenize.NEWLINE,
    tokenize.NL,
}


def lines_of_code(source: str) -> int:
    """Count the lines that hold more than a docstring, a comment or nothing."""
    documentation: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        # A string that stands alone: a docstring, also that of an attribute.
        match node:
            case ast.Expr(ast.Constant(str())):
                documentation.update(range(node.lineno, (node.end_lineno or 0) + 1))
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            code.update(range(token.start[0], token.end[0] + 1))
    return len(code - documentation)


def long_functions(source: str, limit: int) -> list[str]:
    """Return the functions that are longer, by name and length; a signature counts one."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = node.body[0] if ast.get_docstring(node) is not None else None
            body = node.body[docstring is not None :] or node.body
            length = (node.end_lineno or 0) - body[0].lineno + 2
            if length > limit:
                found.append(f"{node.name}: {length}")
    return found


def core() -> dict[str, str]:
    """Return the sources of what has no public package of its own: the modules of the façade."""
    sources = sources_of_the_package()
    return {name: sources[name] for name in sources if is_private(name) and "." not in name}


def test_the_core_does_not_grow() -> None:
    lines = {module: lines_of_code(source) for module, source in core().items()}

    assert "_scope" in lines
    assert sum(lines.values()) <= CORE_LINES, lines


def test_no_file_of_the_package_is_long() -> None:
    lengths = {module: source.count("\n") for module, source in sources_of_the_package().items()}

    assert {module: lines for module, lines in lengths.items() if lines > FILE_LINES} == {}


def test_no_function_of_the_package_is_long() -> None:
    found = {
        module: long_functions(source, FUNCTION_LINES)
        for module, source in sources_of_the_package().items()
    }

    assert {module: functions for module, functions in found.items() if functions} == {}


def test_no_file_of_the_tests_is_long() -> None:
    root = Path(__file__).parents[1]
    lengths = {
        str(path.relative_to(root)): path.read_text(encoding="utf-8").count("\n")
        for path in root.rglob("*.py")
    }

    assert {path: lines for path, lines in lengths.items() if lines > TEST_FILE_LINES} == {}


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        pytest.param('"""Doc\n\nstring."""\n', 0, id="docstring"),
        pytest.param("# why\n\n", 0, id="comment"),
        pytest.param('x = 1  # why\n"""Of an attribute."""\n', 1, id="attribute"),
        pytest.param('x = """a\nb"""\n', 2, id="string"),
        pytest.param("f(\n    1,\n)\n", 3, id="call"),
        pytest.param('def f():\n    """Doc."""\n    return 1\n', 2, id="function"),
    ],
)
def test_lines_of_code_are_counted(source: str, lines: int) -> None:
    assert lines_of_code(source) == lines


def test_a_long_function_is_found() -> None:
    source = 'def f():\n    """Doc."""\n    pass\n    pass\n\ndef g():\n    pass\n'

    assert long_functions(source, 2) == ["f: 3"]
