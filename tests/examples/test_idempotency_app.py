"""The example with idempotency keys, run as its user would run it."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import pytest

from tests.examples.test_examples import running

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.postgres import Server


def pay(address: str, key: str | None, **form: str) -> tuple[int, str, bool]:
    """Send a payment; return status, body, and whether it was replayed."""
    headers = {} if key is None else {"Idempotency-Key": key}
    try:
        with urlopen(Request(address, urlencode(form).encode(), headers), timeout=60) as response:
            replayed = response.headers.get("Idempotent-Replayed") == "true"
            return response.status, response.read().decode(), replayed
    except HTTPError as error:
        with error:
            return error.code, error.read().decode(), False


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_a_payment_is_made_once(
    database: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """However often it is repeated with its key."""
    variables: dict[str, str] = {}
    if database == "postgres":
        server: Server = request.getfixturevalue("postgres_server")
        url = server.create_database(f"payments_{os.getpid()}")
        variables["DATABASE_URL"] = url.render_as_string(hide_password=False)

    with running("idempotency_app.py", tmp_path, **variables) as address:
        refused = pay(address, "k", to="ann", amount="ten")
        first = pay(address, "k", to="ann", amount="10")
        again = pay(address, "k", to="ann", amount="10")
        other = pay(address, "k", to="bob", amount="10")
        without = pay(address, None, to="ann", amount="10")
        with urlopen(address, timeout=60) as response:
            payments = json.load(response)

    assert refused == (422, "the amount must be a number", False)
    assert (first[0], first[2]) == (201, False)
    assert again == (201, first[1], True)
    assert (other[0], json.loads(other[1])["code"]) == (422, "key_reused")
    assert (without[0], json.loads(without[1])["code"]) == (400, "key_missing")
    assert payments == [{"id": 1, "to": "ann", "amount": 10}]
