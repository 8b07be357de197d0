"""Markdown and the facts about the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

DISTRIBUTIONS = (
    "wsgi_dbsession",
    "SQLAlchemy",
    "psycopg",
    "Flask",
    "Flask-SQLAlchemy",
    "Flask-SQLAlchemy-Lite",
    "bottle",
    "bottle-sqlalchemy",
    "falcon",
    "falcon-sqla",
    "pyramid",
    "pyramid_tm",
    "repoze.tm2",
    "zope.sqlalchemy",
    "transaction",
    "gunicorn",
    "gevent",
)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table: the first column is text, the others are numbers."""
    lines = [
        "| " + " | ".join(heads) + " |",
        "|" + "|".join([" --- ", *[" ---: "] * (len(heads) - 1)]) + "|",
    ]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def prose(text: str) -> str:
    """Return a paragraph in one line, whatever its indentation was."""
    return " ".join(text.split()) + "\n"


def percent(ratio: float) -> str:
    return f"{(ratio - 1) * 100:+.1f} %"


def warn(message: str) -> None:
    """Say on the terminal what the report will say too: something is missing here."""
    print(f"ATTENTION: {message}", file=sys.stderr, flush=True)


def versions(distributions: Iterable[str] = DISTRIBUTIONS) -> str:
    found = [f"{name} {importlib.metadata.version(name)}" for name in distributions]
    return f"{platform.python_implementation()} {platform.python_version()}, " + ", ".join(found)


def machine() -> str:
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    load = f", load average {os.getloadavg()[0]:.1f} at the start" if _has_load() else ""
    return f"{model}, {os.cpu_count()} cores, {platform.system()} {platform.release()}{load}"


def _has_load() -> bool:
    return hasattr(os, "getloadavg")


def commit() -> str:
    """Return the commit of the working tree, if it is one."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            check=True,
            cwd=Path(__file__).parent,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
