"""Idempotency keys: ``python idempotency_app.py`` serves payments on http://127.0.0.1:8000/.

A payment that a client repeats with the same key is made once::

    curl -i -H "Idempotency-Key: $(uuidgen)" -d "to=ann" -d "amount=10" http://127.0.0.1:8000/
"""

import os
from datetime import timedelta

from flask import Flask, request
from sqlalchemy import String, create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, scoped_session, sessionmaker

from wsgi_dbsession import SessionMiddleware, current_scope, session_scope
from wsgi_dbsession.idempotency import Idempotency, idempotency_table, purge

engine = create_engine(os.environ.get("DATABASE_URL", "sqlite:///payments.db"))
Session = scoped_session(sessionmaker(engine), scopefunc=current_scope)


class Base(DeclarativeBase):
    pass


class Payment(Base):
    __tablename__ = "payment"

    id: Mapped[int] = mapped_column(primary_key=True)
    receiver: Mapped[str] = mapped_column(String(100))
    amount: Mapped[int]


keys = idempotency_table(Base.metadata)


def token_of(environ: dict[str, str]) -> str | None:
    """Return the credentials: whoever has them may see the response again."""
    return environ.get("HTTP_AUTHORIZATION")


app = Flask(__name__)
app.wsgi_app = SessionMiddleware(  # type: ignore[method-assign]
    Idempotency(app.wsgi_app, Session, keys, principal=token_of, required=True), Session
)


@app.get("/")
def payments() -> list[dict[str, object]]:
    return [
        {"id": payment.id, "to": payment.receiver, "amount": payment.amount}
        for payment in Session.query(Payment).order_by(Payment.id)
    ]


@app.post("/")
def pay() -> tuple[dict[str, int] | str, int]:
    amount = request.form.get("amount", "")
    if not amount.isdecimal():
        return "the amount must be a number", 422  # rolled back: the key can be used again
    payment = Payment(receiver=request.form["to"], amount=int(amount))
    Session.add(payment)
    Session.flush()
    # Not here: a mail is not in the transaction, so it would be sent for what is rolled back.
    current_scope().on_commit(lambda: app.logger.warning("mail: %s paid", amount))
    return {"id": payment.id}, 201


if __name__ == "__main__":
    Base.metadata.create_all(engine)
    with session_scope(Session):
        purge(Session, keys, older_than=timedelta(days=2))  # a job would do it every day
    app.run(port=int(os.environ.get("PORT", "8000")))
