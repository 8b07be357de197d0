"""Retry: ``python retry_app.py`` serves transfers of money on http://127.0.0.1:8000/.

A transfer that lost a race against another one runs again, and its client gets its answer. On
PostgreSQL (``DATABASE_URL=postgresql+psycopg://...``), SERIALIZABLE detects such races.
"""

import os
from typing import Any

from flask import Flask, request
from sqlalchemy import Connection, create_engine, event
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, scoped_session, sessionmaker

from wsgi_dbsession import SessionMiddleware, current_scope
from wsgi_dbsession.retry import RetryMiddleware, run_transaction

engine = create_engine(
    os.environ.get("DATABASE_URL", "sqlite:///accounts.db"), isolation_level="SERIALIZABLE"
)
Session = scoped_session(sessionmaker(engine), scopefunc=current_scope)

if engine.dialect.name == "sqlite":
    # Python's driver begins a transaction before the first write: reads would not be part of it.

    @event.listens_for(engine, "connect")
    def leave_it_to_us(connection: Any, record: object) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "account"

    name: Mapped[str] = mapped_column(primary_key=True)
    balance: Mapped[int] = mapped_column(default=100)


def is_locked(error: BaseException) -> bool:
    """Return whether another transaction is writing: SQLite has no code for it."""
    return isinstance(error, OperationalError) and "database is locked" in str(error.orig)


app = Flask(__name__)
# Accounts that everybody uses lose many races: let time be the limit, not the number.
app.wsgi_app = RetryMiddleware(  # type: ignore[method-assign]
    SessionMiddleware(app.wsgi_app, Session), attempts=100, timeout=30, on=is_locked
)


@app.get("/")
def balances() -> dict[str, int]:
    return {account.name: account.balance for account in Session.query(Account)}


@app.post("/")
def transfer() -> tuple[str, int]:
    source = Session.get(Account, request.form["from"])
    target = Session.get(Account, request.form["to"])
    amount = int(request.form["amount"])
    if source is None or target is None:
        return "no such account", 404
    if source.balance < amount:
        return "not enough money", 409
    source.balance -= amount
    target.balance += amount
    # Not here: what is not in the transaction would happen in each attempt.
    current_scope().on_commit(app.logger.warning, "mail: %d transferred", amount)
    return f"done, in attempt {request.environ['wsgi_dbsession.attempt']}", 200


def open_accounts() -> None:
    for name in ("ann", "bob"):
        if Session.get(Account, name) is None:
            Session.add(Account(name=name))


if __name__ == "__main__":
    Base.metadata.create_all(engine)
    run_transaction(open_accounts, Session)  # the same for scripts and jobs
    app.run(port=int(os.environ.get("PORT", "8000")))
