"""Run the example of README.md in an empty folder, as somebody who has just met the package.

python -m tests.docs.readme [PYTHON]   with another interpreter, which has Flask and the package
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import urlopen

from tests.docs.pages import blocks, run, serving, unused_port


def run_example(folder: Path, python: str = sys.executable) -> None:
    """Write ``app.py``, run Flask's server and the commands, and look at what they saved.

    :raises AssertionError: the example does not do what README.md says.
    """
    (folder / "app.py").write_text(blocks("README.md")[0], encoding="utf-8")
    port = unused_port()
    with serving(folder, [python, "-m", "flask", "run", "--port", str(port)], port) as address:
        notes = f"http://{address}/notes"
        with urlopen(notes, urlencode({"text": "hello"}).encode(), timeout=60) as response:
            assert response.status == 201
        run(folder, "flask", "greet", python=python)
        with urlopen(notes, timeout=60) as response:
            body = response.read().decode()
    assert body == '["hello","from the command line"]\n', body


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as empty:
        run_example(Path(empty), *sys.argv[1:])
    print("The example of README.md works.")
