"""What is special about Django, without its ORM."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from django.conf import settings
from django.core.signals import request_finished
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse
from django.test import Client as DjangoClient
from django.urls import path

from tests.frameworks.apps.database import Session
from tests.frameworks.server import Client
from tests.support.models import Note
from wsgi_dbsession import NoScopeError, SessionMiddleware, current_scope, session_scope

if TYPE_CHECKING:
    from tests.support.models import Database


def add(request: HttpRequest) -> HttpResponse:
    Session.add(Note(text="new"))
    return HttpResponse("added")


def fail(request: HttpRequest) -> HttpResponse:
    Session.add(Note(text="lost"))
    raise RuntimeError("not handled")


async def add_async(request: HttpRequest) -> HttpResponse:
    await asyncio.sleep(0)
    Session.add(Note(text="async"))
    return HttpResponse("added")


urlpatterns = [path("add", add), path("fail", fail), path("async", add_async)]


@pytest.fixture
def client(shop: Database) -> Client:
    """A client of the views of this module, in the middleware."""
    settings.ROOT_URLCONF = __name__
    return Client(SessionMiddleware(get_wsgi_application(), Session))


def test_a_propagated_exception_rolls_back(client: Client, shop: Database) -> None:
    """With DEBUG_PROPAGATE_EXCEPTIONS it reaches the server."""
    settings.DEBUG_PROPAGATE_EXCEPTIONS = True

    assert client.send("GET", "/fail").by_server
    assert shop.notes() == []


def test_the_debug_page_is_a_rollback(client: Client, shop: Database) -> None:
    """With DEBUG Django shows the traceback, in a response with status 500."""
    settings.DEBUG = True

    assert b"not handled" in client.send("GET", "/fail").body
    assert shop.notes() == []


def test_an_async_view_has_the_scope_of_its_request(client: Client, shop: Database) -> None:
    """Django runs it in another thread with a copy of the context; it is the same unit of work."""
    assert client.send("GET", "/async").whole
    assert shop.notes() == ["async"]


def test_request_finished_comes_after_the_outcome(client: Client, shop: Database) -> None:
    """Django sends it when the response is closed."""
    outcomes = []

    def note(**kwargs: object) -> None:
        outcomes.append(current_scope().outcome)

    request_finished.connect(note)
    try:
        client.get("/add")
    finally:
        request_finished.disconnect(note)

    assert outcomes == ["commit"]


def test_djangos_test_client_goes_around_the_middleware(client: Client, shop: Database) -> None:
    """It calls Django's handler, no WSGI application: there is no scope but one of the test."""
    django = DjangoClient()

    with pytest.raises(NoScopeError):
        django.get("/add")
    with session_scope(Session):
        assert django.get("/add").status_code == 200
    assert shop.notes() == ["new"]
