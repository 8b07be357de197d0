"""A child of a fork has an account of its own; so has the page of each worker."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text

from wsgi_dbsession import session_scope

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.orm import Session, scoped_session

    from wsgi_dbsession.watch import Watch

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork()")


def in_child(look: Callable[[], object]) -> str:
    """Return what a function returns in a child."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.write(write, repr(look()).encode())
        except BaseException as error:
            os.write(write, repr(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as answer:
        found = answer.read().decode()
    os.waitpid(pid, 0)
    return found


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_begins_anew(
    registry: scoped_session[Session], make_watch: Callable[..., Watch]
) -> None:
    """It has none of its parent's holders and ends, and a guard of its own."""
    watch = make_watch(registry, warn_after=60)
    with session_scope(registry, name="parent"):
        registry.execute(text("SELECT 1"))

    def look() -> object:
        known: list[Any] = [watch.holders(), watch.waiting(), watch.ended(), watch.places()]
        with session_scope(registry, name="child"):
            registry.execute(text("SELECT 1"))
            known.append([holder.name for holder in watch.holders()])
            known.append([thread.name for thread in threading.enumerate()][1:])
        return [*known, [ended.name for ended in watch.ended()]]

    with session_scope(registry, name="holder"):
        registry.execute(text("SELECT 1"))
        found = in_child(look)
        assert [holder.name for holder in watch.holders()] == ["holder"]

    assert found == repr([[], [], [], [], ["child"], ["wsgi_dbsession.watch"], ["child"]])
    assert [ended.name for ended in watch.ended()] == ["holder", "parent"]


def test_a_fork_without_handlers_is_noticed(
    registry: scoped_session[Session], watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """UWSGI forks in C: the account compares the number of its process."""
    with session_scope(registry):
        registry.execute(text("SELECT 1"))
    assert len(watch.ended()) == 1

    monkeypatch.setattr("wsgi_dbsession.watch._account.getpid", lambda: -1)

    assert watch.ended() == []
