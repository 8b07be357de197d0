"""The wiring of docs/frameworks.md works as it is written there."""

from __future__ import annotations

import re
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from django.conf import settings
from django.utils.functional import empty

from tests.frameworks.apps import FRAMEWORKS, Framework
from tests.frameworks.server import Client
from tests.frameworks.tables import DOCUMENT
from tests.support.models import Note, make_database

if TYPE_CHECKING:
    from pathlib import Path


BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks_by_heading() -> dict[str, str]:
    """Return the Python code under each heading of the document."""
    code: dict[str, str] = {}
    for section in re.split(r"^#+ ", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE):
        heading, _, rest = section.partition("\n")
        code[heading] = "\n".join(BLOCK.findall(rest))
    return code


@pytest.mark.parametrize("framework", [pytest.param(each, id=each.name) for each in FRAMEWORKS])
def test_the_wiring_in_the_document_works(
    framework: Framework, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The snippet, in a module of its own, commits what its view adds."""
    lazy: Any = settings
    lazy._wrapped = empty  # the snippet configures Django
    monkeypatch.chdir(tmp_path)
    # Django finds the views of its snippet by this name.
    module = ModuleType("mysite.urls")
    monkeypatch.setitem(sys.modules, "mysite", ModuleType("mysite"))
    monkeypatch.setitem(sys.modules, "mysite.urls", module)
    code = blocks_by_heading()

    for heading in ("Wiring", framework.name):
        exec(compile(code[heading], f"{DOCUMENT}: {heading}", "exec"), vars(module))
    app = getattr(module, "application", None) or module.app  # Django's runserver asks for that
    answer = Client(app).send("POST", "/notes", text="written")

    module.engine.dispose()
    assert answer.whole
    assert answer.code in (302, 303)
    assert make_database(f"sqlite:///{tmp_path / 'app.db'}").committed(Note.text) == ["written"]
