"""The checks of ``make release-check`` pass, and find what they are to find."""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING

import pytest

from tests.release import check

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.long, pytest.mark.xdist_group("release"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist and the wheel, which are the same when they are built again."""
    return check.build(tmp_path_factory.mktemp("build"))


def test_the_descriptions_can_be_rendered(files: tuple[Path, Path]) -> None:
    """As PyPI renders them."""
    check.check_descriptions(*files)


def test_the_contents_are_the_project(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Nothing is missing, and nothing else is there; a file too many is found."""
    sdist, wheel = files
    check.check_contents(sdist, wheel)

    spoiled = tmp_path / wheel.name
    spoiled.write_bytes(wheel.read_bytes())
    with zipfile.ZipFile(spoiled, "a") as archive:
        archive.writestr("wsgi_dbsession/left_over.py", "")
    with pytest.raises(AssertionError):
        check.check_contents(sdist, spoiled)


def test_the_metadata_is_complete(files: tuple[Path, Path]) -> None:
    """Name, licence, Pythons, requirements, addresses."""
    check.check_metadata(files[1])


def test_the_wheel_works_in_an_empty_environment(files: tuple[Path, Path], tmp_path: Path) -> None:
    """It needs SQLAlchemy only, and runs the example of README.md."""
    check.check_installation(files[1], tmp_path)


def test_the_workflows_have_no_findings() -> None:
    """Pinned, without credentials that stay, without more permissions than they need."""
    check.check_workflows()
