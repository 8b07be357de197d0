"""The page of the board, and a policy that allows only its own script and style."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

PAGE = files(__name__.rpartition(".")[0]).joinpath("page.html").read_bytes()
"""The page is static: its script fetches the data."""


def _hash(element: bytes) -> str:
    (content,) = re.findall(rb"<%b>(.*?)</%b>" % (element, element), PAGE, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"


POLICY = "; ".join(
    [
        "default-src 'none'",
        "base-uri 'none'",
        "connect-src 'self'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        f"script-src {_hash(b'script')}",
        f"style-src {_hash(b'style')}",
    ]
)
"""The Content-Security-Policy of the board."""
