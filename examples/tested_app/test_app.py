"""The tests of the guest book. None of them cleans up, and none leaves a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy import select

from tested_app.app import Entry, Guest, Session, outbox
from wsgi_dbsession import session_scope

if TYPE_CHECKING:
    from flask.testing import FlaskClient

    from wsgi_dbsession.testing import Recorded


@pytest.fixture
def guest(dbsession_isolation: object) -> str:
    with session_scope(Session):
        Session.add(Guest(name="ada"))
    return "ada"


def entries() -> list[str]:
    with session_scope(Session):
        return list(Session.scalars(select(Entry.text)))


def test_the_book_is_empty_at_first(client: FlaskClient) -> None:
    assert client.get("/entries.txt").text == ""


def test_a_guest_is_welcomed_after_the_commit(
    client: FlaskClient, dbsession_isolation: list[Recorded]
) -> None:
    assert client.post("/guests", data={"name": "ada"}).status_code == 201

    assert dbsession_isolation[-1].outcome == "commit"
    assert outbox == ["welcome, ada"]


def test_a_name_is_given_once(
    client: FlaskClient, dbsession_isolation: list[Recorded], guest: str
) -> None:
    assert client.post("/guests", data={"name": guest}).status_code == 409

    assert dbsession_isolation[-1].reason == "veto"
    assert dbsession_isolation[-1].hooks == []


def test_an_entry_is_read_back(client: FlaskClient, guest: str) -> None:
    assert client.post("/entries", data={"name": guest, "text": "hello"}).status_code == 201

    assert entries() == ["hello"]
    assert client.get("/entries.txt").text == "hello\n"


def test_an_empty_entry_is_not_kept(
    client: FlaskClient, dbsession_isolation: list[Recorded], guest: str
) -> None:
    assert client.post("/entries", data={"name": guest, "text": ""}).status_code == 400

    assert dbsession_isolation[-1].reason == "veto"
    assert entries() == []


def test_a_failed_login_is_counted_in_spite_of_the_status(
    client: FlaskClient, dbsession_isolation: list[Recorded], guest: str
) -> None:
    assert client.post("/login", data={"name": guest}).status_code == 403

    assert dbsession_isolation[-1].reason == "kept"
    with session_scope(Session):
        assert Session.scalars(select(Guest.failed_logins).filter_by(name=guest)).one() == 1


@pytest.mark.usefixtures("dbsession_scope")
def test_entries_are_listed_in_their_order(client: FlaskClient) -> None:
    Session.add(Guest(name="ada"))
    Session.flush()
    Session.add_all(Entry(guest="ada", text=text) for text in ("one", "two"))
    Session.commit()

    assert client.get("/entries.txt").text == "one\ntwo\n"
    client.post("/entries", data={"name": "ada", "text": "three"})
    assert Session.scalars(select(Entry.text)).all() == ["one", "two", "three"]


@pytest.fixture(scope="class")
def full_book(dbsession_class_isolation: object) -> None:
    with session_scope(Session):
        Session.add(Guest(name="bob"))
        Session.flush()
        Session.add_all(Entry(guest="bob", text=f"entry {number}") for number in range(100))


@pytest.mark.usefixtures("full_book")
class TestFullBook:
    """Here many tests share one costly preparation, and are isolated from each other in it."""

    def test_it_is_exported(self, client: FlaskClient) -> None:
        assert client.get("/entries.txt").text.count("\n") == 100

    def test_it_has_room_for_more(self, client: FlaskClient) -> None:
        client.post("/entries", data={"name": "bob", "text": "one more"})

        assert len(entries()) == 101

    def test_it_is_again_as_it_was(self, client: FlaskClient) -> None:
        assert len(entries()) == 100
