"""A request with a key has written it, so its connection cannot be given back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import select

from tests.idempotency.shop import Note, order, protect
from wsgi_dbsession import current_scope

if TYPE_CHECKING:
    from collections.abc import Iterable

    from _typeshed.wsgi import StartResponse, WSGIEnvironment

    from tests.idempotency.shop import Place


def test_a_request_with_a_key_is_refused_and_one_without_is_not(place: Place) -> None:
    """The key is committed with the work, so it is lost with it too."""
    registry = place.registry()
    outcomes: list[str] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        registry.scalars(select(Note)).all()
        try:
            with current_scope().released():
                outcomes.append("released")
        except RuntimeError as error:
            outcomes.append(str(error).partition(": ")[2])
        start_response("201 Created", [])
        return [b"done"]

    protected = protect(app, registry)

    assert order(protected).status == order(protected, key=None).status == "201 Created"
    assert "something was written or is pending" in outcomes[0]
    assert outcomes[1:] == ["released"]
    assert place.keys() == ["201 Created"]
