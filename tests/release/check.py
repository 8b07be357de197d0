"""What must hold before a release.

python -m tests.release.check [FOLDER]   and leave the checked files in a folder
"""

from __future__ import annotations

import email
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from tests.docs.pages import ROOT
from tests.docs.readme import run_example

if TYPE_CHECKING:
    from email.message import Message

PACKAGE = "wsgi_dbsession"


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Run a program, and return its output.

    :raises AssertionError: it fails.
    """
    words = [str(each) for each in command]
    done = subprocess.run(words, cwd=cwd, check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}{done.stderr}"
    return done.stdout


def tracked() -> set[str]:
    """Return the files that belong to the project, committed or about to be."""
    return set(run("git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines())


def build(folder: Path) -> tuple[Path, Path]:
    """Build the sdist, and the wheel from it, each twice.

    :return: their paths.
    :raises AssertionError: they differ.
    """
    for number in ("first", "second"):
        # Without an environment of its own: what builds is that of the dependency group.
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / number)
    first, second = (sorted((folder / number).iterdir()) for number in ("first", "second"))
    assert [each.name for each in first] == [each.name for each in second]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes(), f"{one.name} differs from build to build"
    wheel, sdist = sorted(first, key=lambda each: each.suffix != ".whl")
    return sdist, wheel


def check_descriptions(sdist: Path, wheel: Path) -> None:
    """Check that PyPI can render the descriptions."""
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)


def check_contents(sdist: Path, wheel: Path) -> None:
    """Check that the sdist is the project, and the wheel the package."""
    files = tracked()
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names == files | {"PKG-INFO"}, names ^ (files | {"PKG-INFO"})

    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = {name for name in files if name.startswith(f"{PACKAGE}/")}
    assert f"{PACKAGE}/py.typed" in package
    others = {name.partition("/")[2] for name in names - package}
    assert package <= names, package - names
    assert others == {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}, (
        others
    )


def read_metadata(wheel: Path) -> Message:
    """Return what the wheel says of itself."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def check_metadata(wheel: Path) -> None:
    """Check what installers and PyPI read."""
    metadata = read_metadata(wheel)
    assert metadata["Name"] == PACKAGE
    assert wheel.name == f"{PACKAGE}-{metadata['Version']}-py3-none-any.whl"
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Description-Content-Type"] == "text/markdown"
    needed = [Requirement(each) for each in metadata.get_all("Requires-Dist", [])]
    assert [each.name for each in needed if each.marker is None] == ["sqlalchemy"]
    addresses = dict(each.split(", ", 1) for each in metadata.get_all("Project-URL", []))
    assert {"Documentation", "Source", "Issues", "Changes"} <= addresses.keys()


def check_installation(wheel: Path, folder: Path) -> None:
    """Install into an empty environment, and run the example of README.md there."""
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", wheel)
    version = read_metadata(wheel)["Version"]
    program = (
        f"import {PACKAGE} as p; import {PACKAGE}.retry, {PACKAGE}.testing; print(p.__version__)"
    )
    assert run(python, "-W", "error", "-c", program, cwd=folder) == f"{version}\n"
    listed = run(python, "-m", "pip", "list", "--format", "freeze", "--exclude", "pip")
    names = {line.partition("==")[0].lower().replace("-", "_") for line in listed.splitlines()}
    # greenlet comes with SQLAlchemy 2.0.
    needed = {PACKAGE, "sqlalchemy", "typing_extensions"}
    assert needed <= names <= needed | {"greenlet", "setuptools"}, names

    run(python, "-m", "pip", "install", "--quiet", "flask")
    example = folder / "example"
    example.mkdir()
    run_example(example, str(python))


def check_workflows() -> None:
    """Check the workflows that will publish."""
    run(Path(sys.executable).with_name("zizmor"), "--offline", "--no-progress", ".github")


def main(arguments: list[str]) -> None:
    """Check everything, and say so."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sdist, wheel = build(folder)
        print("the sdist and the wheel are the same, built twice")
        check_descriptions(sdist, wheel)
        check_contents(sdist, wheel)
        check_metadata(wheel)
        print("descriptions, contents and metadata are right")
        check_installation(wheel, folder)
        print("the example of README.md works in an empty environment")
        check_workflows()
        print("zizmor finds nothing in the workflows")
        for target in arguments:
            shutil.copytree(sdist.parent, target, dirs_exist_ok=True)
            print(f"{sdist.name} and {wheel.name} are in {target}")


if __name__ == "__main__":
    main(sys.argv[1:])
