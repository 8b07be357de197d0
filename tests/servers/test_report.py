"""The documentation says what was seen, of every server."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from .facts import load
from .fleet import SERVERS, Running, Server
from .report import PAGE, page, required

if TYPE_CHECKING:
    from .conftest import Observer

if os.environ.get("WSGI_DBSESSION_RECORD"):
    pytest.skip("the page is being written", allow_module_level=True)


def test_the_page_is_what_was_written_down() -> None:
    """docs/servers.md is made from results.json, not by hand."""
    assert PAGE.read_text() == page(load()), "make docs-servers"


@pytest.mark.parametrize("server", SERVERS, ids=lambda server: server.name)
def test_every_cell_is_measured(server: Server) -> None:
    """Each server has every cell of the tables, or a reason why it was not run."""
    facts = load()[server.name]
    if "not run" not in facts:
        assert required() <= facts.keys()


def test_uwsgi_ends_what_it_chunks_in_good_order(
    observer: Observer, database_url: str, token: str
) -> None:
    """The page advises against --http-auto-chunked: a failed stream is a success with it."""
    server = next(server for server in SERVERS if server.name == "uWSGI http router")
    if reason := server.missing():
        pytest.skip(f"NOT RUN: {server.name}: {reason}")
    running = Running(server, database_url, "--http-keepalive", "--http-auto-chunked")
    try:
        seen = running.fetch(f"/default/respond?kind=generator&commit=fails&token={token}")
        assert not observer.saved(token)
        assert (seen.kind, seen.framing) == ("200", "chunked")
    finally:
        running.stop()
