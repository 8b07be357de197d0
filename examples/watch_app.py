"""The watch: ``python watch_app.py`` serves a shop on http://127.0.0.1:8000/, its board on /_db.

A button sends requests that keep their connections while they wait for a slow bank. The pool has
five, so further requests wait, and time out: the board, and the log, name who holds them.
"""

import logging
import os
import time

from flask import Flask
from sqlalchemy import QueuePool, create_engine, func, select
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, scoped_session, sessionmaker

from wsgi_dbsession import SessionMiddleware, current_scope
from wsgi_dbsession.watch import Watch

BANK_S = float(os.environ.get("BANK_S", "20"))  # how long the bank takes to answer

engine = create_engine(
    os.environ.get("DATABASE_URL", "sqlite:///shop.db"),
    poolclass=QueuePool,
    pool_size=5,
    max_overflow=0,
    pool_timeout=BANK_S / 4,
)
Session = scoped_session(sessionmaker(engine), scopefunc=current_scope)
watch = Watch(Session, warn_after=BANK_S / 10)


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "order"

    id: Mapped[int] = mapped_column(primary_key=True)


app = Flask(__name__)
app.wsgi_app = watch.board(  # type: ignore[method-assign]
    SessionMiddleware(app.wsgi_app, Session, observers=[watch]), "/_db"
)

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>A shop with a small pool</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 40em; margin: 2em auto; padding: 0 1em }
button { font: inherit; padding: .4em 1em }
</style>
<h1>A shop with a small pool</h1>
<p>The pool has 5 connections. Each payment keeps one while it waits for the bank.</p>
<p><button>Send 8 payments</button>
and then look at <a href="/_db" target="_blank">the board</a>.</p>
<ul></ul>
<script>
document.querySelector("button").addEventListener("click", () => {
  for (let number = 1; number <= 8; number++) {
    const item = document.createElement("li");
    item.textContent = `payment ${number}: waiting`;
    document.querySelector("ul").append(item);
    fetch(`/pay/${number}`, {method: "POST"}).then(async answer => {
      item.textContent = `payment ${number}: ${answer.status} ${await answer.text()}`;
    });
  }
});
</script>
</html>
"""


@app.get("/")
def page() -> str:
    return PAGE


@app.post("/pay/<int:number>")
def pay(number: int) -> str:
    orders = Session.scalar(select(func.count()).select_from(Order))
    ask_bank(number)  # the connection is held meanwhile: released() gives it back
    return f"paid, one of {orders} orders"


def ask_bank(number: int) -> None:
    time.sleep(BANK_S)


@app.errorhandler(PoolTimeoutError)
def busy(error: PoolTimeoutError) -> tuple[str, int]:
    # The holders are for the log, which has them already, and not for the client.
    return "no connection is free", 503


if __name__ == "__main__":
    logging.basicConfig()
    Base.metadata.create_all(engine)
    app.run(port=int(os.environ.get("PORT", "8000")), threaded=True)
