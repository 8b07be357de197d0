"""What a client sees of a commit that fails, and of an application that raises."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from .client import Connection

if TYPE_CHECKING:
    from .client import Seen
    from .conftest import Observer
    from .facts import Facts
    from .fleet import Running

pytestmark = [pytest.mark.usefixtures("clean"), pytest.mark.promise("servers")]

#: kind of body: the number of its blocks
BODIES = {
    "list of one": 1,
    "list": 3,
    "sized": 1,
    "one, length": 1,
    "generator, length": 3,
    "one": 1,
    "generator": 3,
    "empty": 0,
    "write": 3,
    "write, length": 3,
}
#: Those of which nothing was sent at the outcome, so that another answer can take their place
UNSENT = {"list of one", "list", "one, length", "empty"}
BLOCK = 1024


def respond(
    running: Running,
    token: str,
    kind: str,
    *words: str,
    mount: str = "default",
    method: str = "GET",
    version: str = "1.1",
) -> Seen:
    """Ask for a response of this kind."""
    query = "&".join([f"kind={kind.replace(' ', '+')}", f"token={token}", *words])
    return running.fetch(f"/{mount}/respond?{query}", method=method, version=version)


every_body = pytest.mark.parametrize("kind", BODIES)


def judge(seen: Seen, running: Running, kind: str = "") -> str:
    """Put what was seen in words, and fail if it is a success that the server could deny.

    By RFC 9112, section 6.3, a body that ends with its connection is whole if that ends in order:
    there no server has the means to tell. Some end a body of unknown length in order whatever
    happens.
    """
    if seen.framing == "close" and seen.success:
        return f"{seen.kind}, ended by closing"
    hides = running.server.hides_errors
    hides_it = hides == "always" or (hides == "after write()" and kind == "write")
    if seen.success and hides_it and seen.framing == "chunked":
        return f"{seen.kind}, whole"
    assert not seen.success, (seen, running.log())
    return seen.kind


def skip_write(running: Running, facts: Facts, what: str, kind: str) -> bool:
    """Return whether this is about a `write()` that the server does not give."""
    if not running.server.writes and kind.startswith("write"):
        facts.see(what, "no write()")
        return True
    return False


@every_body
def test_a_client_gets_its_body_and_its_row_is_saved(
    running: Running, observer: Observer, facts: Facts, token: str, kind: str
) -> None:
    """Without any failure the response is whole, and its transaction committed by then."""
    if skip_write(running, facts, f"success: {kind}", kind):
        return
    seen = respond(running, token, kind)
    assert observer.saved(token)
    assert seen.kind == "200", running.log()
    assert len(seen.body) == BODIES[kind] * BLOCK
    assert seen.header("content-type") == "text/plain"
    facts.see(f"success: {kind}", f"{seen.kind}, {seen.framing}")


@pytest.mark.promise("no false success")
@every_body
def test_a_failed_commit_is_no_success(
    running: Running, observer: Observer, facts: Facts, token: str, kind: str
) -> None:
    """No client gets a whole, successful response whose transaction did not commit."""
    if skip_write(running, facts, f"failed commit: {kind}", kind):
        return
    seen = respond(running, token, kind, "commit=fails")
    assert not observer.saved(token)
    facts.see(f"failed commit: {kind}", judge(seen, running, kind))


@pytest.mark.promise("no false success", "no body")
@every_body
def test_a_failed_commit_is_no_success_for_head(
    running: Running, observer: Observer, facts: Facts, token: str, kind: str
) -> None:
    """Nor is a HEAD answered with a success, though no body can be cut short."""
    if skip_write(running, facts, f"failed commit, HEAD: {kind}", kind):
        return
    seen = respond(running, token, kind, "commit=fails", method="HEAD")
    assert not observer.saved(token)
    facts.see(f"failed commit, HEAD: {kind}", judge(seen, running, kind))


@every_body
def test_commit_error_answers_where_nothing_was_sent(
    running: Running, observer: Observer, facts: Facts, token: str, kind: str
) -> None:
    """The application given as commit_error answers a failed commit."""
    if skip_write(running, facts, f"commit_error: {kind}", kind):
        return
    seen = respond(running, token, kind, "commit=fails", mount="answered")
    assert not observer.saved(token)
    facts.see(f"commit_error: {kind}", judge(seen, running, kind))
    if kind in UNSENT:
        assert (seen.kind, seen.body) == ("503", b"not saved"), running.log()


@pytest.mark.parametrize("kind", ["one", "generator", "write"])
def test_a_failed_commit_before_the_headers_is_a_500(
    running: Running, observer: Observer, facts: Facts, token: str, kind: str
) -> None:
    """With commit_on="headers" no body is too long, and no protocol too old."""
    what = f'failed commit, commit_on="headers", HTTP/1.0: {kind}'
    if skip_write(running, facts, what, kind):
        return
    seen = respond(running, token, kind, "commit=fails", mount="headers", version="1.0")
    assert not observer.saved(token)
    assert not seen.success, (seen, running.log())
    facts.see(what, seen.kind)


def test_http_1_0_cannot_tell_the_end_of_a_body(
    running: Running, observer: Observer, facts: Facts, token: str
) -> None:
    """A client of HTTP/1.0 knows no chunks: without a Content-Length the body ends by closing."""
    seen = respond(running, token, "generator", "commit=fails", version="1.0")
    assert not observer.saved(token)
    facts.see("failed commit, HTTP/1.0: generator", judge(seen, running))


def test_http_1_0_is_safe_with_a_content_length(
    running: Running, observer: Observer, facts: Facts, token: str
) -> None:
    """With a Content-Length the oldest client can tell."""
    seen = respond(running, token, "generator, length", "commit=fails", version="1.0")
    assert not observer.saved(token)
    assert not seen.success, (seen, running.log())


def test_commit_on_close_is_too_late(
    running: Running, observer: Observer, facts: Facts, token: str
) -> None:
    """For comparison: what a commit in close(), the classic order, lets the client believe."""
    seen = respond(running, token, "one, length", "commit=fails", mount="close")
    assert not observer.saved(token)
    facts.see('failed commit, commit_on="close": one, length', seen.kind)


@pytest.mark.parametrize("where", ["call", "first", "between", "end"])
@pytest.mark.parametrize("kind", ["generator", "generator, length", "generator application"])
def test_an_error_of_the_application_rolls_back(
    running: Running, observer: Observer, facts: Facts, token: str, kind: str, where: str
) -> None:
    """What the application raises rolls back, and the client can tell."""
    seen = respond(running, token, kind, f"raise={where}")
    if (kind, where) == ("generator, length", "end"):
        # The last of the announced bytes was the end: what comes after it is no part of the work.
        assert observer.saved(token)
        assert seen.kind == "200"
        return
    assert not observer.saved(token)
    facts.see(f"error, {where}: {kind}", judge(seen, running, kind))


def comparable(seen: Seen) -> tuple[bytes, bytes, str]:
    """The response without what differs from second to second."""
    return re.sub(rb"(?im)^date:.*$", b"Date", seen.raw_head), seen.body, seen.ended


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    "path",
    [
        "file?",
        "file?length=1",
        *(f"respond?kind={kind.replace(' ', '+')}" for kind in BODIES if kind != "sized"),
        "respond?kind=generator+application",
        "status?status=204+No+Content",
        "status?status=304+Not+Modified",
        "status?status=404+Not+Found",
    ],
)
def test_the_response_is_the_same_without_us(
    running: Running, token: str, path: str, method: str
) -> None:
    """Byte for byte, what the server makes of a response is what it makes of it without us."""
    # bjoern never ends a file without a Content-Length: that too is the same.
    bare = running.fetch(f"/bare/{path}&token={token}", method=method, timeout=3)
    ours = running.fetch(f"/default/{path}&token={token}", method=method, timeout=3)
    if method == "HEAD" and "write" in path:
        return  # what is written is held to the outcome, and never needed
    if running.server.name == "granian" and "application" in path:
        # It reads status and headers when the call returns, and so loses those of a generator
        # application, but not with us, who ask for the first block already in the call.
        assert bare.header("content-type") is None
        assert ours.header("content-type") == "text/plain"
        return
    assert comparable(ours) == comparable(bare)
    if bare.status == 200:
        assert bare.header("content-type") == "text/plain"


def test_files_go_by_sendfile_with_us_too(running: Running, facts: Facts) -> None:
    """A server that sends files by sendfile, where Python can count it, does so with us too."""
    counts = []
    # On one connection, if it is kept alive: the counter is that of one worker process.
    with Connection(running.port) as connection:
        for path in (
            "/state",
            "/bare/file?length=1",
            "/state",
            "/default/file?length=1",
            "/state",
        ):
            connection.send(path)
            seen = connection.receive()
            assert seen.whole
            if path == "/state":
                counts.append(json.loads(seen.body)["sendfiles"])
            if not seen.reusable or connection.wait_closed(0.05):
                connection.close()
                connection.open()
    assert counts[2] - counts[1] == counts[1] - counts[0]
    facts.see("os.sendfile", "yes" if counts[0] < counts[1] else "no")
