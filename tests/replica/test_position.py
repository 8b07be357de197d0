"""Positions, and the cookies that carry them: nothing that is forged or broken counts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.replica.site import SECRET
from wsgi_dbsession.replica._position import NOWHERE, START, Cookies, Position

positions = st.builds(Position, st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFFFFFFFFFFFFFF))


def make_cookies(
    name: str = "dbpos",
    secret: str | bytes = SECRET,
    max_age: int = 600,
    *,
    secure: bool = False,
) -> Cookies:
    return Cookies(name, secret, max_age, secure=secure)


def pairs(cookies: Cookies, *found: Position) -> list[str]:
    """Return what a client sends of the cookies of these positions."""
    return [next(cookies.headers(each, ""))[1].partition(";")[0] for each in found]


def test_postgresql_writes_a_position_in_two_parts() -> None:
    """Both are hexadecimal."""
    assert Position.read(3, "16/B374D848") == (3, 0x16B374D848)
    assert Position.read(1, "0/1") == (1, 1)


@pytest.mark.parametrize(
    ("replica", "cookie", "covers"),
    [
        pytest.param((1, 100), (1, 100), True, id="the same place"),
        pytest.param((1, 101), (1, 100), True, id="further"),
        pytest.param((1, 99), (1, 100), False, id="behind"),
        pytest.param((2, 100), (1, 100), True, id="after a failover"),
        pytest.param((2, 99), (1, 100), False, id="after a failover, behind"),
        pytest.param((1, 200), (2, 100), False, id="on the branch of the former primary"),
    ],
)
def test_a_replica_must_be_far_enough_on_the_timeline(
    replica: tuple[int, int], cookie: tuple[int, int], covers: bool
) -> None:
    """Both numbers count, each on its own."""
    assert Position(*replica).covers(Position(*cookie)) is covers


@given(positions, positions)
def test_a_join_is_the_first_that_covers_both(one: Position, other: Position) -> None:
    """Every replica is at the start, and none is nowhere."""
    joined = one.join(other)

    assert joined.covers(one)
    assert joined.covers(other)
    assert joined in ((one.timeline, other.lsn), (other.timeline, one.lsn), one, other)
    assert one.covers(START)
    assert one == NOWHERE or not one.covers(NOWHERE) or one.lsn == NOWHERE.lsn


@given(st.lists(positions, max_size=4))
def test_a_client_brings_back_what_it_was_given(found: list[Position]) -> None:
    """All of its cookies count, among those of others."""
    cookies = make_cookies()
    header = "; ".join(["theme=dark", *pairs(cookies, *found), "dbpos=1", "dbpos-=1"])

    joined = START
    for each in found:
        joined = joined.join(each)
    assert cookies.position(header) == joined


def test_the_header_of_a_cookie() -> None:
    """Scripts cannot read it, other sites do not send it, and it is short-lived."""
    ((name, value),) = make_cookies(max_age=60).headers(Position(1, 0x30295B8), "")
    ((_, secure),) = make_cookies(secure=True).headers(Position(1, 1), "")

    assert name == "Set-Cookie"
    pair, *attributes = value.split("; ")
    assert pair.startswith("dbpos-1-30295b8=1.")
    assert attributes == ["Max-Age=60", "Path=/", "HttpOnly", "SameSite=Lax"]
    assert secure.split("; ")[-1] == "Secure"


def test_a_new_position_replaces_those_that_it_covers() -> None:
    """A client does not collect cookies; what the new position does not cover stays."""
    cookies = make_cookies()
    former = pairs(cookies, Position(1, 100), Position(1, 200), Position(1, 300), Position(2, 1))

    headers = [value for _, value in cookies.headers(Position(1, 200), "; ".join(former))]

    assert headers[0].startswith("dbpos-1-c8=1.")
    assert headers[1:] == ["dbpos-1-64=; Max-Age=0; Path=/; HttpOnly; SameSite=Lax"]


def forgeries() -> list[Any]:
    (pair,) = pairs(make_cookies(), Position(1, 100))
    name, _, value = pair.partition("=")
    (other,) = pairs(make_cookies(secret=SECRET * 2), Position(1, 100))
    (renamed,) = pairs(make_cookies("session"), Position(1, 100))
    return [
        pytest.param("", id="no cookie"),
        pytest.param(f"{name}=", id="no value"),
        pytest.param(name, id="no equals sign"),
        pytest.param(f"{name}=1.{'0' * 32}", id="another signature"),
        pytest.param(other, id="another secret"),
        pytest.param(f"dbpos-1-65={value}", id="another position"),
        pytest.param(f"dbpos-2-64={value}", id="another timeline"),
        pytest.param(f"dbpos{renamed.removeprefix('session')}", id="another name"),
        pytest.param(f"{name}=2{value[1:]}", id="another version"),
        pytest.param(f"dbpos-1-ffffffffffffffffff={value}", id="too large"),
        pytest.param(f"dbpos-1-+64={value}", id="a sign"),
        pytest.param(f"dbpos-1-0x64={value}", id="a prefix"),
        pytest.param(f"{name}={value}\xe9", id="not ASCII"),
        pytest.param(f"{name}={value}\u20ac", id="not even Latin-1"),
        pytest.param("=;;=; ;", id="nonsense"),
    ]


@pytest.mark.parametrize("header", forgeries())
def test_what_this_secret_has_not_signed_is_ignored(header: str) -> None:
    """A client cannot send the reads of others to the primary, nor its own."""
    assert make_cookies().position(header) == START
    assert make_cookies().position("dbpos-9-9=1.9; " + header) == START


@given(st.text())
def test_no_header_is_an_error(header: str) -> None:
    """Whatever a client sends."""
    assert make_cookies().position(header) == START


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            {"secret": "short"}, "secret must have at least 16 bytes, got 5", id="secret"
        ),
        pytest.param({"secret": b"short"}, "secret must have", id="secret, bytes"),
        pytest.param({"name": "a b"}, r"cookie must consist of .*, got 'a b'", id="cookie"),
        pytest.param({"name": ""}, r"cookie must consist of .*, got ''", id="no cookie"),
        pytest.param({"max_age": 0}, "max_age must be at least 1 second, got 0", id="max_age"),
    ],
)
def test_an_argument_is_out_of_range(options: dict[str, Any], message: str) -> None:
    """It is found when the application is built, and the secret is not shown."""
    with pytest.raises(ValueError, match=message) as caught:
        make_cookies(**options)

    assert "short" not in str(caught.value)
