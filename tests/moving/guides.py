"""Carry out a guide of docs/moving/: apply its diffs to an application, and import the result."""

from __future__ import annotations

import importlib
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.docs.pages import blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent


class Guide:
    """A page, and the application that its reader has: the directory of the same name.

    :param name: such as ``"global-session"``.
    :param folder: where to put the application.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.page = f"docs/moving/{name}.md"
        self.folder = folder / "application"
        source = HERE / name.replace("-", "_")
        shutil.copytree(source, self.folder, ignore=shutil.ignore_patterns("__pycache__"))

    def carry_out(self) -> None:
        """Apply all diffs of the page.

        :raises AssertionError: one does not apply, or applies in two places.
        """
        diffs = blocks(self.page, "diff")
        assert diffs, f"{self.page} has no diff"
        for diff in diffs:
            apply(diff, self.folder)

    @contextmanager
    def imported(self, module: str = "app") -> Iterator[Any]:
        """Import a module of the application; forget all of its modules afterwards."""
        before = set(sys.modules)
        sys.path.insert(0, str(self.folder))
        importlib.invalidate_caches()
        try:
            yield importlib.import_module(module)
        finally:
            sys.path.remove(str(self.folder))
            for name in set(sys.modules) - before:
                file = getattr(sys.modules[name], "__file__", None)
                if file is not None and Path(file).is_relative_to(self.folder):
                    del sys.modules[name]


def apply(diff: str, folder: Path) -> None:
    """Apply a diff without line numbers: its context must be there once."""
    head, new_head, *lines = diff.splitlines()
    name = head.removeprefix("--- ")
    assert (head, new_head) == (f"--- {name}", f"+++ {name}"), f"no file is named by {head!r}"
    assert {line[:1] for line in lines} <= {" ", "-", "+"}, f"not a diff: {diff}"
    old = "".join(f"{line[1:]}\n" for line in lines if line[0] != "+")
    new = "".join(f"{line[1:]}\n" for line in lines if line[0] != "-")
    path = folder / name
    text = f"\n{path.read_text(encoding='utf-8')}"
    found = text.count(f"\n{old}")
    assert found == 1, f"found {found} times in {name}:\n{old}"
    path.write_text(text.replace(f"\n{old}", f"\n{new}")[1:], encoding="utf-8")
