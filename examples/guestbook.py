"""A guestbook: the application of the demo, as a user of the package would write it.

Flask, plain SQLAlchemy, and one line that wraps the application. ``demo.py`` serves it with
gevent; any other WSGI server will do, such as ``gunicorn "guestbook:create_app()"``.
"""

from __future__ import annotations

import os
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from flask import Flask, Response, redirect, render_template_string, request, stream_with_context
from sqlalchemy import ForeignKey, create_engine, event, select
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    mapped_column,
    relationship,
    scoped_session,
    sessionmaker,
)

from wsgi_dbsession import Scope, SessionMiddleware, current_scope

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from sqlalchemy import Engine
    from werkzeug.wrappers import Response as Answer

Session = scoped_session(sessionmaker(), scopefunc=current_scope)


class Base(DeclarativeBase):
    """The tables of the guestbook."""


class Guest(Base):
    """Somebody who may sign."""

    __tablename__ = "guest"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)


class Entry(Base):
    """What a guest wrote. The database asks only at COMMIT whether there is such a guest."""

    __tablename__ = "entry"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]
    guest_id: Mapped[int] = mapped_column(
        ForeignKey("guest.id", deferrable=True, initially="DEFERRED")
    )
    guest: Mapped[Guest] = relationship()


def make_engine(url: str) -> Engine:
    """Make the engine; a stream of the demo holds one of its five connections while it runs."""
    engine = create_engine(url, pool_pre_ping=True, pool_size=5, max_overflow=0)
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def check_foreign_keys(connection: Any, _: object) -> None:
            connection.execute("PRAGMA foreign_keys=ON")

    return engine


def create_app(url: str | None = None) -> Flask:
    """Make the application, for a database URL or for ``DATABASE_URL``."""
    engine = make_engine(url or os.environ.get("DATABASE_URL", "sqlite:///guestbook.db"))
    Base.metadata.create_all(engine)
    Session.session_factory.configure(bind=engine)

    app = Flask(__name__)
    app.wsgi_app = SessionMiddleware(  # type: ignore[method-assign]
        app.wsgi_app, Session, commit_error=sorry
    )
    outcomes: deque[str] = deque(maxlen=8)

    def tell_the_reason(scope: Scope, what: str) -> None:
        reason = "commit failed" if scope.failure else scope.reason
        outcomes.appendleft(f"{what}: rolled back ({reason})")

    @app.before_request
    def tell_the_outcome() -> None:
        if request.method == "POST":
            scope = current_scope()
            what = f"{request.method} {request.path}"
            scope.on_commit(lambda: outcomes.appendleft(f"{what}: committed"))
            scope.on_rollback(tell_the_reason, scope, what)

    @app.get("/")
    def page() -> str:
        entries = Session.scalars(select(Entry).order_by(Entry.id.desc()).limit(20)).all()
        return render_template_string(PAGE, entries=entries, outcomes=outcomes)

    @app.post("/sign")
    def sign() -> Answer:
        Session.add(Entry(text=request.form["text"], guest=the_guest(request.form["name"])))
        return redirect("/", 303)  # committed before the browser is told to come back

    @app.post("/crash")
    def crash() -> str:
        Session.add(Entry(text="never seen", guest=the_guest("Nobody")))
        Session.flush()
        raise RuntimeError("a bug after the INSERT")

    @app.post("/stranger")
    def stranger() -> str:
        Session.add(Entry(text="by a guest who does not exist", guest_id=-1))
        return "Thank you for your entry!"  # and no client will ever read that

    @app.post("/stream")
    def stream() -> Response:
        def lines() -> Iterator[str]:
            for number in range(1, 6):
                Session.add(Entry(text=f"line {number} of a stream", guest=the_guest("Stream")))
                Session.flush()
                yield f"line {number} is written\n"
                time.sleep(0.2)

        return Response(stream_with_context(lines()), mimetype="text/plain")

    return app


def the_guest(name: str) -> Guest:
    """Return the guest of that name, a new one if need be."""
    guest = Session.scalar(select(Guest).where(Guest.name == name))
    if guest is None:
        guest = Guest(name=name)
        Session.add(guest)
    return guest


def sorry(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Answer where the commit failed and nothing has been sent yet."""
    start_response("500 Internal Server Error", [("Content-Type", "text/plain; charset=utf-8")])
    return [b"The commit failed, so nothing was saved. This is no success, and you can tell.\n"]


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Guestbook</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto;
         padding: 0 1rem; color: #222; background: #fafafa }
  h1 { margin-bottom: 0 }
  h2 { font-size: 1.1rem; margin: 1.8rem 0 .4rem }
  form { margin: .3rem 0; display: flex; gap: .5rem; align-items: baseline; flex-wrap: wrap }
  input { padding: .3rem .5rem; border: 1px solid #bbb; border-radius: 4px; font: inherit }
  button { padding: .3rem .8rem; border: 1px solid #369; border-radius: 4px; background: #369;
           color: white; font: inherit; cursor: pointer; min-width: 12rem }
  table { border-collapse: collapse; width: 100% }
  td { padding: .25rem .5rem; border-bottom: 1px solid #ddd }
  td:first-child { color: #777; width: 3rem }
  li { font-family: ui-monospace, monospace; font-size: .9rem }
  .hint { color: #666 }
</style>
<h1>Guestbook</h1>
<p class="hint">Each button is one request with a session of its own.</p>
<form method="post" action="/sign">
  <input name="name" placeholder="your name" required size="12">
  <input name="text" placeholder="your entry" required size="24">
  <button>Sign</button> <span class="hint">committed, then you are sent back here</span>
</form>
<form method="post" action="/crash">
  <button>Sign and crash</button> <span class="hint">an error after the INSERT: rolled back</span>
</form>
<form method="post" action="/stranger">
  <button>Sign as a stranger</button>
  <span class="hint">the COMMIT fails: a 500, not the 200 that the view returned</span>
</form>
<form method="post" action="/stream">
  <button>Stream five lines</button> <span class="hint">committed when the body is whole</span>
</form>
<form id="leave">
  <button>Leave a stream</button> <span class="hint">the client goes away: rolled back</span>
</form>
<h2>Last outcomes</h2>
<ol>{% for outcome in outcomes %}<li>{{ outcome }}</li>{% else %}<li>none yet</li>{% endfor %}</ol>
<h2>Entries</h2>
<table>{% for entry in entries %}
<tr><td>{{ entry.id }}</td><td>{{ entry.guest.name }}</td><td>{{ entry.text }}</td></tr>
{% else %}<tr><td></td><td>none yet</td></tr>{% endfor %}</table>
<script>
document.getElementById("leave").addEventListener("submit", event => {
  event.preventDefault();
  const leave = new AbortController();
  fetch("/stream", {method: "POST", signal: leave.signal}).then(r => r.text()).catch(() => {});
  setTimeout(() => leave.abort(), 500);
  setTimeout(() => location.reload(), 1500);
});
</script>
</html>
"""
