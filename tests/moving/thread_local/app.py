"""A bank, with the session of the thread and a teardown that removes it."""

from database import db_session
from flask import Flask, abort, request
from models import Account, Transfer
from sqlalchemy.exc import IntegrityError

app = Flask(__name__)


@app.teardown_appcontext
def shutdown_session(exception=None):
    db_session.remove()


@app.post("/accounts")
def open_account():
    try:
        db_session.add(Account(name=request.form["name"], balance=100))
        db_session.commit()
    except IntegrityError:
        db_session.rollback()
        abort(409)
    return "", 201


@app.get("/accounts/<name>")
def balance(name):
    account = Account.query.filter_by(name=name).first() or abort(404)
    return {"balance": account.balance}


@app.post("/transfers")
def transfer():
    amount = int(request.form["amount"])
    source = db_session.get(Account, request.form["from"]) or abort(404)
    source.balance -= amount
    db_session.add(Transfer(what=f"{amount} from {source.name}"))
    db_session.commit()
    target = db_session.get(Account, request.form["to"]) or abort(404)
    target.balance += amount
    db_session.commit()
    return "", 201


@app.delete("/accounts/<name>")
def close_account(name):
    db_session.delete(db_session.get(Account, name) or abort(404))
    return "", 204
