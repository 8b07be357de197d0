"""What is special about Pyramid: its tweens, pyramid_tm, and applications mounted as views."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import zope.sqlalchemy
from pyramid.config import Configurator
from pyramid.events import NewRequest
from pyramid.request import Request
from pyramid.response import Response
from pyramid.wsgi import wsgiapp2
from sqlalchemy.orm import scoped_session, sessionmaker

from tests.frameworks.apps import mounted
from tests.frameworks.apps.database import Session, add_orphan
from tests.frameworks.server import Client
from tests.support.models import Note
from wsgi_dbsession import SessionMiddleware, current_scope

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed.wsgi import StartResponse, WSGIEnvironment

    from tests.support.models import Database


def wrap(view: Callable[[Any], Any], registry: Any, *, pyramid_tm: bool = False) -> Client:
    with Configurator() as config:
        if pyramid_tm:
            config.include("pyramid_tm")
        config.add_route("page", "/")
        config.add_view(view, route_name="page")
        return Client(SessionMiddleware(config.make_wsgi_app(), registry))


def test_pyramid_tm_without_zope_sqlalchemy_does_no_harm(shop: Database) -> None:
    """A tween that was left in place has nothing to commit: the middleware does."""

    def add(request: Request) -> Response:
        Session.add(Note(text="new"))
        return Response("added")

    assert wrap(add, Session, pyramid_tm=True).send("POST", "/").whole
    assert shop.notes() == ["new"]


@pytest.mark.parametrize(
    ("pyramid_tm", "error", "notes"),
    [
        pytest.param(True, None, ["new"], id="with pyramid_tm: the tween commits"),
        pytest.param(False, AssertionError, [], id="without: every commit is refused"),
    ],
)
def test_a_session_registered_with_zope_sqlalchemy_is_not_ours(
    pyramid_tm: bool, error: type[BaseException] | None, notes: list[str], database: Database
) -> None:
    """zope.sqlalchemy lets only its transaction manager commit, and its error says so."""
    registry = scoped_session(sessionmaker(database.engine), scopefunc=current_scope)
    zope.sqlalchemy.register(registry)

    def add(request: Request) -> Response:
        registry.add(Note(text="new"))
        return Response("added")

    answer = wrap(add, registry, pyramid_tm=pyramid_tm).send("POST", "/")

    assert type(answer.error) is (error or type(None))
    assert database.notes() == notes


def test_with_pyramid_tm_the_tween_decides_though_the_stream_goes_on(database: Database) -> None:
    """The tween commits before the body, so the writes stay when the stream fails."""
    registry = scoped_session(sessionmaker(database.engine), scopefunc=current_scope)
    zope.sqlalchemy.register(registry)

    def stream(request: Request) -> Response:
        registry.add(Note(text="before the stream"))

        def lines() -> Any:
            yield b"one"
            raise RuntimeError("in mid-stream")

        return Response(app_iter=lines())

    assert not wrap(stream, registry, pyramid_tm=True).send("POST", "/").whole
    assert database.notes() == ["before the stream"]


def test_a_request_property_gives_the_session_of_the_request(shop: Database) -> None:
    """request.dbsession, as Pyramid's cookiecutter has it, without a transaction manager."""

    def add(request: Request) -> Response:
        request.dbsession.add(Note(text="by the property"))
        return Response("added")

    with Configurator() as config:
        config.add_request_method(lambda request: Session(), "dbsession", reify=True)
        config.add_route("page", "/")
        config.add_view(add, route_name="page")
        client = Client(SessionMiddleware(config.make_wsgi_app(), Session))

    assert client.send("POST", "/").whole
    assert shop.notes() == ["by the property"]


def test_an_exception_view_may_use_the_session(shop: Database) -> None:
    """It belongs to the same unit of work: what it writes shares the outcome of its status."""

    def fail(request: Request) -> None:
        Session.add(Note(text="view"))
        raise RuntimeError("not handled")

    def answer_202(error: RuntimeError, request: Request) -> Response:
        Session.add(Note(text="exception view"))
        return Response(f"{Session.query(Note).count()} notes", status=202)

    with Configurator() as config:
        config.add_route("page", "/")
        config.add_view(fail, route_name="page")
        config.add_exception_view(answer_202, context=RuntimeError)
        client = Client(SessionMiddleware(config.make_wsgi_app(), Session))

    assert client.send("POST", "/").body == b"2 notes"
    assert shop.notes() == ["exception view", "view"]


def test_a_subrequest_is_part_of_the_request(shop: Database) -> None:
    """invoke_subrequest does not go through the middleware: one Session, one outcome."""

    def outer(request: Request) -> Response:
        Session.add(Note(text="outer"))
        inner = request.invoke_subrequest(Request.blank("/inner", method="POST"))
        add_orphan()
        return Response(inner.text)

    def inner(request: Request) -> Response:
        Session.add(Note(text="inner"))
        return Response(str(Session.query(Note).count()))

    with Configurator() as config:
        config.add_route("outer", "/outer")
        config.add_view(outer, route_name="outer")
        config.add_route("inner", "/inner")
        config.add_view(inner, route_name="inner")
        client = Client(SessionMiddleware(config.make_wsgi_app(), Session))

    assert client.send("POST", "/inner").body == b"1"
    assert client.send("POST", "/outer").by_server
    assert shop.notes() == ["inner"]


def unwrapped(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
    Session.add(Note(text="mounted"))
    start_response("201 Created", [("Content-Type", "text/plain")])
    return [b"created"]


@pytest.mark.parametrize(
    ("app", "notes"),
    [
        pytest.param(mounted.mounted, ["mounted"], id="its own middleware: its own outcome"),
        pytest.param(unwrapped, [], id="no middleware of its own: the request's outcome"),
    ],
)
def test_a_mounted_application_shares_the_outcome_if_it_has_no_middleware(
    app: Any, notes: list[str], postgres_shop: Database
) -> None:
    """Pyramid mounts with a copy of the environ, so an inner middleware begins a new request."""

    def before(event: object) -> None:
        Session.add(Note(text="outer"))
        add_orphan()

    with Configurator() as config:
        config.add_subscriber(before, NewRequest)
        config.add_route("mounted", "/*subpath")
        config.add_view(wsgiapp2(app), route_name="mounted")
        client = Client(SessionMiddleware(config.make_wsgi_app(), Session))

    assert client.send("POST", "/mounted").by_server
    assert postgres_shop.notes() == notes
