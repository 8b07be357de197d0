"""What cannot work is refused when the application is built, with the fix in the message."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, create_engine
from sqlalchemy.orm import sessionmaker

from tests.idempotency.shop import KEYS, user_of
from tests.support.wsgi import make_registry
from wsgi_dbsession import SessionMiddleware
from wsgi_dbsession.idempotency import Idempotency
from wsgi_dbsession.retry import RetryMiddleware

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

ENGINE = create_engine("sqlite://")
REGISTRY = make_registry(ENGINE)
FOREIGN = Table("foreign", MetaData(), Column("id", Integer), Column("body", Integer))


def nothing(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
    start_response("204 No Content", [])
    return []


def build(**wrong: Any) -> Idempotency:
    right: dict[str, Any] = {
        "app": nothing,
        "registry": REGISTRY,
        "table": KEYS,
        "principal": user_of,
    }
    return Idempotency(**{**right, **wrong})


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        pytest.param({"app": 4}, "app must be callable, got 4", id="app"),
        pytest.param(
            {"app": SessionMiddleware(nothing, REGISTRY)},
            "app must be inside of SessionMiddleware, got <wsgi_dbsession",
            id="around SessionMiddleware",
        ),
        pytest.param(
            {"app": RetryMiddleware(SessionMiddleware(nothing, REGISTRY))},
            "app must be inside of SessionMiddleware, got <wsgi_dbsession",
            id="around RetryMiddleware",
        ),
        pytest.param(
            {"registry": sessionmaker(ENGINE)},
            "registry must be a scoped_session, got sessionmaker",
            id="sessionmaker",
        ),
        pytest.param({"table": "keys"}, "table must be a Table, got 'keys'", id="table's name"),
        pytest.param({"principal": "ann"}, "principal must be callable, got 'ann'", id="a name"),
        pytest.param({"principal": None}, "principal must be callable, got None", id="None"),
        pytest.param({"required": "yes"}, "required must be a bool, got 'yes'", id="required"),
        pytest.param({"wait": 1}, "wait must be a bool, got 1", id="wait"),
        pytest.param({"max_body": "1k"}, "max_body must be an int, got '1k'", id="max_body"),
        pytest.param(
            {"max_response": 1.5}, "max_response must be an int, got 1.5", id="max_response"
        ),
        pytest.param(
            {"headers": "Location"}, "headers must be several names, got 'Loc", id="one header"
        ),
        pytest.param(
            {"headers": [b"Location"]}, "each of headers must be a str, got b'Loc", id="bytes"
        ),
    ],
)
def test_an_argument_of_the_wrong_type_is_refused(argument: Any, message: str) -> None:
    """A TypeError names the argument and shows what it got."""
    with pytest.raises(TypeError) as caught:
        build(**argument)

    assert str(caught.value).startswith(message)
    assert ". " in str(caught.value), "a sentence that says how to fix it"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        pytest.param(
            {"table": FOREIGN},
            "table must have the columns claim, created_at, fingerprint, headers, "
            "idempotency_key, status, got Table('foreign'",
            id="another table",
        ),
        pytest.param({"max_body": -1}, "max_body must be at least 0, got -1", id="max_body"),
        pytest.param(
            {"max_response": -5}, "max_response must be at least 0, got -5", id="max_response"
        ),
        pytest.param(
            {"headers": ["Location", "Transfer-Encoding"]},
            "headers must not contain 'Transfer-Encoding'",
            id="hop by hop",
        ),
    ],
)
def test_an_argument_with_a_wrong_value_is_refused(argument: Any, message: str) -> None:
    """A ValueError names the argument and shows what it got."""
    with pytest.raises(ValueError, match=r"\. ") as caught:
        build(**argument)

    assert str(caught.value).startswith(message)


def test_what_is_right_is_accepted() -> None:
    """All options at once, and the application is there to be looked at."""
    made = build(
        required=lambda environ: True,
        wait=False,
        max_body=0,
        max_response=0,
        headers=["Location", "Set-Cookie"],
    )

    assert made.app is nothing


def test_a_principal_must_be_given() -> None:
    """It has no default: who may see a stored response is a decision."""
    with pytest.raises(TypeError, match="principal"):
        Idempotency(nothing, REGISTRY, KEYS)  # type: ignore[call-arg]
