"""The answer to a repeated request discards nothing, whatever its status is."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from tests.idempotency.shop import KEYS, Note, Shop, order, protect, user_of
from tests.support.errors import AppError, raise_error
from wsgi_dbsession import SessionMiddleware, current_scope
from wsgi_dbsession.idempotency import Idempotency

if TYPE_CHECKING:
    from collections.abc import Iterable

    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from sqlalchemy.orm import Session, scoped_session

    from tests.idempotency.shop import Place


def test_a_replay_and_a_refusal_are_not_logged_as_discards(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """They have read the key and nothing else, and that is committed."""
    registry = place.registry()
    shop = Shop(registry, lambda text: current_scope().keep(), "401 Unauthorized")
    app = protect(shop, registry)

    def commit_and_fail(text: str) -> None:
        registry.commit()
        raise_error()

    unfinished = protect(Shop(registry, commit_and_fail), registry)
    order(app)
    with pytest.raises(AppError):
        order(unfinished, key="another")

    with caplog.at_level(logging.INFO, "wsgi_dbsession"):
        assert order(app).is_replayed
        assert order(app, b"coffee").code == "key_reused"
        assert order(unfinished, key="another").code == "unfinished"

    assert caplog.messages == []


def test_what_was_begun_before_is_rolled_back_with_a_refusal(
    registry: scoped_session[Session], sqlite: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """A middleware outside of Idempotency has written: the status decides about that."""
    inner = Idempotency(Shop(registry), registry, KEYS, principal=user_of)

    def outer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        registry.add(Note(text="seen"))
        registry.flush()
        return inner(environ, start_response)

    app = SessionMiddleware(outer, registry)
    order(app)

    with caplog.at_level(logging.INFO, "wsgi_dbsession"):
        assert order(app, b"coffee").code == "key_reused"

    assert sqlite.notes() == ["seen", "tea"]
    assert "discarding uncommitted changes: status 422" in caplog.text
