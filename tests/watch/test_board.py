"""The board as a client gets it: the page, the JSON, and who may have them."""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text

from tests.support.wsgi import Reply, ask
from wsgi_dbsession import session_scope
from wsgi_dbsession.watch import Watch, _board, allow_loopback

if TYPE_CHECKING:
    from collections.abc import Iterable

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from sqlalchemy import Engine
    from sqlalchemy.orm import Session, scoped_session

LOCAL = {"REMOTE_ADDR": "127.0.0.1", "HTTP_HOST": "127.0.0.1:8000"}
JSON = {"HTTP_ACCEPT": "application/json"}


def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"the application"]


@pytest.fixture
def board(watch: Watch) -> WSGIApplication:
    """A board around an application."""
    return watch.board(application, "/_db")


def look(board: WSGIApplication, method: str = "GET", **environ: str) -> Reply:
    return ask(board, method, "/_db", **{**LOCAL, **environ})


def test_the_page_is_one_file_that_may_run_nothing_else(board: WSGIApplication) -> None:
    """No other address is in it, and the policy allows only its own script and style."""
    reply = look(board)
    page = reply.body.decode()

    assert reply.status == "200 OK"
    assert reply.headers["Content-Type"] == "text/html; charset=utf-8"
    assert reply.headers["Cache-Control"] == "no-store"
    policy = reply.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    assert len(re.findall("'sha256-[^']{44}'", policy)) == 2
    assert "unsafe" not in policy
    assert set(re.findall(r"https?://[^\s\"']+", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\b(src|href)=\"(?!#)", page)


def test_the_json_has_all_that_the_watch_knows(
    registry: scoped_session[Session], watch: Watch, board: WSGIApplication
) -> None:
    """At the same address, by ``Accept``."""
    with session_scope(registry, name="ended"):
        registry.execute(text("SELECT 1"))
    with session_scope(registry, name="holder"):
        registry.execute(text("SELECT :secret"), {"secret": "a parameter"})
        reply = look(board, **JSON)
        (holder,) = watch.holders()
    found = json.loads(reply.body)

    assert reply.headers["Content-Type"] == "application/json"
    assert reply.headers["Vary"] == "Accept"
    assert (found["pid"], found["warn_after"], found["retries"]) == (os.getpid(), None, 0)
    assert [each["name"] for each in found["holders"]] == ["holder"]
    assert found["holders"][0]["since"][:16] == holder.since.isoformat()[:16]
    assert [each["name"] for each in found["ended"]] == ["ended"]
    assert found["pools"][0]["checked_out"] == 1
    assert (found["waiting"], len(found["places"])) == ([], 1)
    assert set(found) == {
        *("pid", "host", "started", "now", "warn_after", "retries"),
        *("pools", "holders", "waiting", "ended", "places"),
    }
    # Neither statements nor parameters.
    assert b"a parameter" not in reply.body
    assert b"SELECT" not in reply.body


def test_the_board_answers_when_the_pool_is_exhausted(
    engine: Engine, board: WSGIApplication
) -> None:
    """It takes no connection."""
    with engine.connect(), engine.connect():
        found = json.loads(look(board, **JSON).body)

    assert len(found["holders"]) == 2
    assert found["pools"][0]["checked_out"] == found["pools"][0]["limit"] == 2


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("", "text/html"),
        ("*/*", "text/html"),
        ("application/json", "application/json"),
        ("application/*", "application/json"),
        ("text/html,application/xhtml+xml,*/*;q=0.8", "text/html"),
        ("text/html;q=0.5, application/json", "application/json"),
        ("text/html, application/json", "text/html"),
        ("application/json;q=0", "text/html"),
        ("application/json;q=nonsense", "text/html"),
        ("application/json;v=1;q=0.9, text/*;q=0.1", "application/json"),
        ("APPLICATION/JSON", "application/json"),
        ("image/png", "text/html"),
    ],
)
def test_the_client_chooses_the_format(accept: str, kind: str, board: WSGIApplication) -> None:
    """The page, where it does not prefer JSON."""
    reply = look(board, HTTP_ACCEPT=accept)

    assert reply.headers["Content-Type"].split(";")[0] == kind


@pytest.mark.parametrize("path", ["/", "/_db/", "/_dbx", "/x/_db"])
def test_another_path_is_the_applications(path: str, board: WSGIApplication) -> None:
    """The board has one address."""
    assert ask(board, "GET", path, **LOCAL).body == b"the application"


def test_a_head_has_no_body(board: WSGIApplication) -> None:
    """But the length of one."""
    reply = look(board, "HEAD")

    assert (reply.status, reply.body) == ("200 OK", b"")
    assert int(reply.headers["Content-Length"]) > 10_000


def test_another_method_is_refused(board: WSGIApplication) -> None:
    """The board changes nothing."""
    reply = look(board, "POST")

    assert (reply.status, reply.headers["Allow"]) == ("405 Method Not Allowed", "GET, HEAD")


@pytest.mark.parametrize(
    ("environ", "allowed"),
    [
        pytest.param({}, True, id="the same machine"),
        pytest.param({"REMOTE_ADDR": "127.8.9.10"}, True, id="another of its addresses"),
        pytest.param({"REMOTE_ADDR": "::1", "HTTP_HOST": "[::1]:8000"}, True, id="by IPv6"),
        pytest.param({"REMOTE_ADDR": "::ffff:127.0.0.1"}, True, id="by IPv4 in IPv6"),
        pytest.param({"HTTP_HOST": "localhost"}, True, id="by its name"),
        pytest.param({"REMOTE_ADDR": "192.168.1.7"}, False, id="another machine"),
        pytest.param({"REMOTE_ADDR": "::ffff:192.168.1.7"}, False, id="another one, by IPv6"),
        pytest.param({"REMOTE_ADDR": ""}, False, id="a Unix socket, behind which is a proxy"),
        pytest.param({"HTTP_X_FORWARDED_FOR": "127.0.0.1"}, False, id="through a proxy"),
        pytest.param({"HTTP_FORWARDED": "for=127.0.0.1"}, False, id="through another proxy"),
        pytest.param({"HTTP_X_FORWARDED_SERVER": "shop"}, False, id="through Apache"),
        pytest.param({"HTTP_X_FORWARDED_PREFIX": "/a"}, False, id="through one with a prefix"),
        pytest.param({"HTTP_X_FORWARDED": "for=x"}, False, id="through an old proxy"),
        pytest.param({"SERVER_SOFTWARE": "waitress"}, False, id="by waitress, which hides one"),
        pytest.param({"waitress.client_disconnected": ""}, False, id="by waitress, renamed"),
        pytest.param({"HTTP_HOST": "shop.example"}, False, id="for another name"),
        pytest.param({"HTTP_HOST": "localhost.example:80"}, False, id="for one that looks alike"),
        pytest.param({"HTTP_HOST": "[fe80::1]"}, False, id="for another machine's address"),
        pytest.param({"HTTP_HOST": ""}, False, id="for no name"),
    ],
)
def test_only_clients_on_this_machine_are_answered(
    environ: dict[str, str], allowed: bool, board: WSGIApplication
) -> None:
    """Others get what they would get if there were no board."""
    reply = look(board, **environ)

    assert reply.status == ("200 OK" if allowed else "404 Not Found")
    assert allow_loopback({**LOCAL, **environ}) is allowed
    assert allowed or b"connection" not in reply.body


def test_the_log_explains_once_why_waitress_gets_no_board(
    watch: Watch, board: WSGIApplication, caplog: pytest.LogCaptureFixture
) -> None:
    """Another refusal is not logged, and ``allow`` opens the board."""
    look(board, REMOTE_ADDR="1.2.3.4")
    assert caplog.records == []
    for _ in range(2):
        look(board, SERVER_SOFTWARE="waitress")
    operators = watch.board(application, "/_db", allow=lambda environ: "REMOTE_USER" in environ)

    assert look(operators, SERVER_SOFTWARE="waitress").status == "404 Not Found"
    assert look(operators, SERVER_SOFTWARE="waitress", REMOTE_USER="ann").status == "200 OK"
    (record,) = caplog.records
    assert record.getMessage().startswith("refusing the board at /_db: waitress removes the head")
    assert record.getMessage().endswith("Pass allow= to Watch.board()")


def test_the_application_decides_who_is_answered(watch: Watch) -> None:
    """``allow`` replaces the rule, and gets the environ."""
    board = watch.board(application, "/_db", allow=lambda environ: environ["REMOTE_USER"] == "ann")

    assert look(board, REMOTE_ADDR="1.2.3.4", REMOTE_USER="ann").status == "200 OK"
    assert look(board, REMOTE_USER="bob").status == "404 Not Found"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param((None,), TypeError, "app must be callable, got None", id="no application"),
        pytest.param(
            (application, "/_db", True), TypeError, "allow must be callable, got True", id="a flag"
        ),
        pytest.param(
            (application, "_db"), ValueError, "must begin with a slash, got '_db'", id="no slash"
        ),
    ],
)
def test_a_board_that_cannot_work_is_refused(
    arguments: Any, error: type[Exception], message: str, watch: Watch
) -> None:
    """When it is made, not at the first request."""
    with pytest.raises(error, match=message):
        watch.board(*arguments)


def test_only_known_values_are_written() -> None:
    """What JSON does not have is a time or a record."""
    with pytest.raises(AssertionError):
        json.dumps({"x": object()}, default=_board._plain)
