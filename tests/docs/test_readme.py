"""README.md: its example works when pasted, its links work on PyPI, it fits on a screen."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

from tests.docs.pages import DOCS, ROOT, blocks
from tests.docs.readme import run_example
from tests.frameworks.apps import FRAMEWORKS
from tests.servers.fleet import SERVERS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from pathlib import Path

README = (ROOT / "README.md").read_text(encoding="utf-8")


def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return dict(table["project"])


def test_the_example_works_in_an_empty_folder(tmp_path: Path) -> None:
    """Pasted, served by ``flask run``, and asked as the commands below it ask."""
    run_example(tmp_path)

    asked, greeted, shown = blocks("README.md", "sh")[1].splitlines()
    assert asked == "curl -d text=hello http://127.0.0.1:5000/notes"
    assert greeted == "flask greet"
    assert shown == "curl http://127.0.0.1:5000/notes"


def test_every_link_is_absolute_and_leads_to_a_file() -> None:
    """PyPI shows the page without its repository: a relative link would be dead there."""
    urls = project()["urls"]
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links

    for link in links:
        address, _, anchor = link.partition("#")
        if address.startswith(urls["Documentation"]):
            page = address.removeprefix(urls["Documentation"]).replace(".html", ".md")
            text = (DOCS / page).read_text(encoding="utf-8")
            headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            assert not anchor or anchor in {each.lower().replace(" ", "-") for each in headings}
        else:
            found = re.fullmatch(rf"{re.escape(urls['Source'])}/(blob|tree)/main/(.*)", address)
            assert found, f"{link} is in neither of the project's addresses"
            assert (ROOT / found[2]).exists(), link


def test_it_fits_on_a_screen() -> None:
    """What is longer belongs into docs/."""
    code = sum(block.count("\n") for block in blocks("README.md"))
    assert README.count("\n") - code < 80


def test_the_commands_it_names_exist() -> None:
    """``make demo`` and ``make test`` are targets."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{command}:", makefile, re.MULTILINE), command


def test_the_numbers_are_those_of_the_tests() -> None:
    """The status counts what the suites run."""
    frameworks = sum(each.distribution is not None for each in FRAMEWORKS)
    servers = {re.split("[ .]", each.name)[0] for each in SERVERS}
    words = {7: "seven", 12: "twelve"}

    assert f"{words[frameworks]} frameworks and {words[len(servers)]} servers" in README
