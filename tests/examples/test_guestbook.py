"""The page of the demo shows the code that runs and what happened, from real events."""

from __future__ import annotations

import html
import inspect
import json
import re
import threading
from io import BytesIO
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import pytest

from tests.support.wsgi import ask, make_environ

if TYPE_CHECKING:
    from collections.abc import Iterable

    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from flask import Flask

    from tests.support.wsgi import Reply
    from wsgi_dbsession import SessionMiddleware

ADA = {"name": "Ada", "text": "Hello!"}
VIEWS = ["sign", "crash", "stranger", "discard", "stream", "hold"]


def press(app: Flask, address: str, form: dict[str, str] | None = None) -> Reply:
    body = urlencode(form or {}).encode()
    path, _, query = address.partition("?")

    def with_body(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        environ["wsgi.input"] = BytesIO(body)
        return app(environ, start_response)

    return ask(
        with_body,
        "POST",
        path,
        QUERY_STRING=query,
        CONTENT_TYPE="application/x-www-form-urlencoded",
        CONTENT_LENGTH=str(len(body)),
    )


def page(app: Flask) -> str:
    reply = ask(app, "GET", "/")
    assert reply.status == "200 OK"
    return reply.body.decode()


def recorder_of(app: Flask) -> Any:
    last: Any = app.jinja_env.globals["happened"]
    return last.__self__


def happened(app: Flask, address: str) -> list[str]:
    """Return the lines that the page shows for a button, as its reader sees them."""
    timeline: Any = app.jinja_env.globals["happened"]
    return [f"{each.text} {each.code}".strip() for each in timeline(address).lines]


def assert_in_order(lines: list[str], *expected: str) -> None:
    rest = iter(lines)
    for each in expected:
        assert any(line.startswith(each) for line in rest), (each, lines)


HELD = "The middleware holds that start."
START = "The start of the response reaches the server: "
COMMIT = "The Session sends COMMIT"
ROLLBACK = "The Session sends ROLLBACK"
BACK = "The connection is back in the pool."


@pytest.mark.parametrize(
    ("address", "status", "expected"),
    [
        pytest.param(
            "/sign",
            "303 SEE OTHER",
            [
                "The application starts a response: 303 SEE OTHER",
                HELD,
                "The Session sends INSERT INTO entry",
                COMMIT,
                BACK,
                "The outcome is: commit.",
                f"{START}303 SEE OTHER",
                "The body is complete.",
            ],
            id="a commit",
        ),
        pytest.param(
            "/crash",
            "500 INTERNAL SERVER ERROR",
            [
                "The Session sends INSERT INTO entry",
                "The application starts a response: 500 INTERNAL SERVER ERROR",
                HELD,
                ROLLBACK,
                BACK,
                "The outcome is: rollback. The status is 4xx or 5xx.",
                f"{START}500 INTERNAL SERVER ERROR",
            ],
            id="a bug",
        ),
        pytest.param(
            "/stranger",
            "500 INTERNAL SERVER ERROR",
            [
                "The application starts a response: 200 OK",
                HELD,
                COMMIT,
                "The database refuses: FOREIGN KEY constraint failed",
                BACK,
                "The commit failed, and its outcome is: rollback.",
                f"{START}500 INTERNAL SERVER ERROR",
            ],
            id="a commit that fails",
        ),
        pytest.param(
            "/discard",
            "500 INTERNAL SERVER ERROR",
            [
                "The Session sends INSERT INTO entry",
                ROLLBACK,
                BACK,
                "The application starts a response: 200 OK",
                HELD,
                "The commit failed, and its outcome is: rollback. cannot commit: a Session was",
                f"{START}500 INTERNAL SERVER ERROR",
            ],
            id="work thrown away",
        ),
        pytest.param(
            "/stream",
            "200 OK",
            [
                HELD,
                f"{START}200 OK",
                "A block of",
                "The Session sends INSERT INTO entry",
                "A block of",
                COMMIT,
                "The outcome is: commit.",
                "The body is complete.",
            ],
            id="a stream",
        ),
    ],
)
def test_the_page_shows_what_happened_in_order(
    app: Flask, address: str, status: str, expected: list[str]
) -> None:
    """Each line stands between those of the events before and after it."""
    reply = press(app, address, ADA)

    assert reply.status == status
    lines = happened(app, address)
    assert_in_order(lines, "The server calls", "The middleware opens", *expected)
    assert "The Session is closed, and the scope ends." in lines
    shown = html.unescape(re.sub("<[^>]+>", "", page(app)))
    assert f"The client got a whole response: {status}." in shown
    for each in expected:
        assert each.replace(": ", ":").split(":")[0] in shown


def test_another_moment_gives_another_timeline(app: Flask, guestbook: Any) -> None:
    """The lines are events: with ``commit_on="close"`` the start comes before the COMMIT."""
    recorder = recorder_of(app)
    middleware: SessionMiddleware = recorder._outer
    other: Any = type(middleware)(
        middleware.app,
        guestbook.Session,
        commit_on="close",
        observers=middleware.observers,
    )
    recorder._outer = other

    press(app, "/sign", ADA)

    assert_in_order(happened(app, "/sign"), f"{START}303", "The body is complete.", COMMIT)


def test_a_client_that_leaves_gets_a_rollback(app: Flask) -> None:
    """The server closes the response early, and the page says so."""
    blocks: Any = app(make_environ("POST", "/stream", QUERY_STRING="leave"), lambda *_: print)
    assert next(blocks)
    assert b"line 1" in next(blocks)
    assert "still on its way" in page(app)
    blocks.close()

    assert_in_order(
        happened(app, "/stream?leave"),
        "The client has gone.",
        ROLLBACK,
        "The outcome is: rollback. The response was not sent in full.",
    )
    assert "The client got part of a response: 200 OK." in page(app)
    assert "None yet." in page(app)


@pytest.mark.parametrize("where", ["call", "body"])
def test_an_error_that_reaches_the_server_is_shown(
    app: Flask, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a server logs as a traceback is a line of the timeline."""
    recorder = recorder_of(app)

    def broken(environ: object, start_response: Any) -> Any:
        if where == "call":
            raise RuntimeError("broken")

        def blocks() -> Any:
            start_response("200 OK", [])
            yield b"first"
            raise RuntimeError("broken")

        return blocks()

    monkeypatch.setattr(recorder, "_inner", broken)
    reply = press(app, "/sign", ADA)

    assert [str(each) for each in reply.errors] == ["broken"]
    assert any(line.endswith("into the server: broken") for line in happened(app, "/sign"))


def test_the_page_shows_the_code_that_runs(app: Flask) -> None:
    """Beside each button stands the source of its view, and no copy of it."""
    shown = html.unescape(page(app))

    for name in VIEWS:
        assert inspect.getsource(app.view_functions[f"guestbook.{name}"]) in shown


@pytest.mark.parametrize(
    ("method", "address", "status"),
    [
        pytest.param("POST", "/crash", "500", id="a bug"),
        pytest.param("POST", "/stranger", "500", id="a failed commit"),
        pytest.param("POST", "/sign", "400", id="a form without its fields"),
        pytest.param("GET", "/sign", "405", id="a wrong method"),
        pytest.param("GET", "/nowhere", "404", id="a wrong address"),
    ],
)
def test_each_error_has_a_page_with_a_link_back(
    app: Flask, method: str, address: str, status: str
) -> None:
    """There is no bare 500, and the link leads to the button."""
    reply = press(app, address) if method == "POST" else ask(app, method, address)

    assert reply.status.startswith(status)
    assert reply.headers["Content-Type"].startswith("text/html")
    assert f'href="/#{address[1:]}"' in reply.body.decode()


def test_the_page_needs_nothing_from_elsewhere(app: Flask) -> None:
    """No asset is external, the favicon is in the page, and each input has a label."""
    shown = page(app)

    assert re.findall(r"""(?:src|href|action)=["'](?!/|#|data:)""", shown) == []
    assert re.findall(r"url\(|@import", shown) == []
    assert '<link rel="icon" href="data:' in shown
    inputs = re.findall(r"<input", shown)
    assert len(inputs) == len(re.findall(r"<label>[^<]+<input", shown)) > 0


def test_what_a_guest_writes_is_escaped(app: Flask) -> None:
    """A guest cannot write markup into the page, nor into an address that it shows."""
    press(app, "/sign", {"name": "<b>", "text": "<script>"})
    shown = page(app)

    assert "<td>&lt;b&gt;</td><td>&lt;script&gt;</td>" in shown


def test_only_the_last_requests_are_kept(app: Flask) -> None:
    """A client that asks for many addresses does not fill the memory."""
    for number in range(30):
        press(app, f"/{number}")

    last: Any = app.jinja_env.globals["happened"]
    assert last("/29") is not None
    assert last("/0") is None


def test_a_writer_waits_for_another(app: Flask) -> None:
    """Two requests that write to the SQLite file at a time both commit."""
    stream: Any = app(make_environ("POST", "/stream"), lambda *_: print)
    assert next(stream)
    assert b"line 1" in next(stream)
    replies: list[Reply] = []
    writer = threading.Thread(target=lambda: replies.append(press(app, "/sign", ADA)))

    writer.start()
    assert b"line 5" in b"".join(stream)
    stream.close()
    writer.join(20)

    assert [each.status for each in replies] == ["303 SEE OTHER"]
    assert "Hello!" in page(app)
    assert "line 5 of a stream" in page(app)


def test_an_exhausted_pool_names_its_holders(
    app: Flask, guestbook: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sixth request gets a page that names the other five, and so does the board."""
    held = threading.Semaphore(0)
    done = threading.Event()

    def sleep(_: float) -> None:
        held.release()
        done.wait(20)

    monkeypatch.setattr(guestbook.app, "time", SimpleNamespace(sleep=sleep))
    threads = [threading.Thread(target=press, args=(app, "/hold")) for _ in range(5)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert held.acquire(timeout=20)
    sixth = press(app, "/hold?sixth")
    board = ask(app, "GET", "/_db", HTTP_ACCEPT="application/json", REMOTE_ADDR="127.0.0.1")
    done.set()
    for thread in threads:
        thread.join(20)

    assert sixth.status == "500 INTERNAL SERVER ERROR"
    assert sixth.body.count(b"POST /hold, held for") == 5
    assert len(json.loads(board.body)["holders"]) == 5
    assert 'href="/_db"' in page(app)
