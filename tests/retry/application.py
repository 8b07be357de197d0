"""The application that the servers of ``test_retry_servers`` run.

Transfers between accounts and doctors on call: the two classic workloads that only SERIALIZABLE
keeps right, and a request's body in various states.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any

import flask
from sqlalchemy import create_engine, text
from sqlalchemy.orm import scoped_session, sessionmaker

from wsgi_dbsession import SessionMiddleware, current_scope
from wsgi_dbsession.retry import Retry, RetryMiddleware

if TYPE_CHECKING:
    from collections.abc import Iterable

    from _typeshed.wsgi import StartResponse, WSGIEnvironment

ACCOUNTS = 10
SHIFTS = 40
MAX_BODY = 100_000

TABLES = f"""
CREATE TABLE account (id INT PRIMARY KEY, balance INT NOT NULL);
CREATE TABLE transfer (id TEXT PRIMARY KEY);
CREATE TABLE doctor (id INT PRIMARY KEY, shift INT NOT NULL, on_call BOOL NOT NULL);
CREATE INDEX ON doctor (shift);
INSERT INTO account SELECT id, 100 FROM generate_series(1, {ACCOUNTS}) AS id;
INSERT INTO doctor SELECT id, id / 2, true FROM generate_series(0, {2 * SHIFTS - 1}) AS id;
"""

engine = create_engine(
    os.environ.get("DATABASE_URL", "sqlite://"),
    isolation_level="SERIALIZABLE",
    **({"pool_size": 16, "max_overflow": 0} if "DATABASE_URL" in os.environ else {}),
)
Session = scoped_session(sessionmaker(engine), scopefunc=current_scope)
app = flask.Flask(__name__)


@app.post("/transfer")
def transfer() -> tuple[str, int]:
    """Read two balances, and write what they are afterwards."""
    source, target, amount = (int(flask.request.form[name]) for name in ("from", "to", "amount"))
    balances: dict[int, int] = {}
    for account in (source, target):
        statement = text("SELECT balance, pg_sleep(0.002) FROM account WHERE id = :id")
        balances[account] = Session.execute(statement, {"id": account}).one()[0]
    if balances[source] < amount:
        return "not enough\n", 409
    balances[source] -= amount
    balances[target] += amount
    for account, balance in balances.items():
        Session.execute(
            text("UPDATE account SET balance = :balance WHERE id = :id"),
            {"balance": balance, "id": account},
        )
    Session.execute(text("INSERT INTO transfer VALUES (:id)"), {"id": flask.request.form["id"]})
    return "done\n", 200


@app.post("/leave")
def leave() -> tuple[str, int]:
    """Go off call, if another doctor of the shift stays: the example of write skew."""
    doctor = {"id": int(flask.request.form["doctor"])}
    on_call = Session.scalar(
        text(
            "SELECT count(*) FROM doctor WHERE on_call AND"
            " shift = (SELECT shift FROM doctor WHERE id = :id)"
        ),
        doctor,
    )
    Session.execute(text("SELECT pg_sleep(0.002)"))
    if on_call == 1:
        return "stay\n", 409
    Session.execute(text("UPDATE doctor SET on_call = false WHERE id = :id"), doctor)
    return "done\n", 200


def body(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Read what the query asks for, fail in the first attempt, and say what the second has read.

    Not in Flask, so that nothing but this reads.
    """
    stream: Any = environ["wsgi.input"]
    read = b""
    if environ["QUERY_STRING"] == "part" and environ["wsgi_dbsession.attempt"] == 1:
        read = stream.read(10)
    elif environ["QUERY_STRING"] != "nothing":
        # Within its length, as PEP 3333 asks for, and not to the end: it may block there.
        left = int(environ.get("CONTENT_LENGTH") or 10**9)
        while left and (block := stream.read(min(left, 8192))):
            read += block
            left -= len(block)
    if environ["wsgi_dbsession.attempt"] == 1:
        raise Retry
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [hashlib.sha256(read).hexdigest().encode()]


def dispatch(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Route the bodies past Flask."""
    wanted = body if environ["PATH_INFO"] == "/body" else app
    return wanted(environ, start_response)


protected = os.environ.get("PROTECTED", "yes") == "yes"
application = RetryMiddleware(
    SessionMiddleware(dispatch, Session),
    attempts=100 if protected else 1,
    max_body=MAX_BODY,
    backoff=0.005,
    backoff_max=0.1,
    timeout=60,
)
