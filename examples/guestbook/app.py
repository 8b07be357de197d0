"""A guestbook, as a user of the package would write it.

Flask, plain SQLAlchemy, and one line in :func:`create_app` that wraps the application.
``examples/demo.py`` serves it, and so does any other WSGI server:
``gunicorn "guestbook:create_app()"`` in the folder ``examples``.
"""

from __future__ import annotations

import inspect
import os
import sys
import time
from typing import TYPE_CHECKING

from flask import (
    Blueprint,
    Flask,
    Response,
    redirect,
    render_template,
    request,
    stream_with_context,
)
from sqlalchemy import select
from sqlalchemy.orm import scoped_session, sessionmaker
from werkzeug.exceptions import HTTPException

from wsgi_dbsession import SessionMiddleware, current_scope
from wsgi_dbsession.watch import Watch

from .database import Base, Entry, Guest, make_engine
from .timeline import Recorder

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from werkzeug.wrappers import Response as Redirect

Session = scoped_session(sessionmaker(), scopefunc=current_scope)
pages = Blueprint("guestbook", __name__)


def the_guest(name: str) -> Guest:
    """Return the guest of that name, and add one if there is none."""
    guest = Session.scalar(select(Guest).where(Guest.name == name))
    if guest is None:
        guest = Guest(name=name)
        Session.add(guest)
    return guest


# -- what the buttons do: the page shows the code of these functions ------------------------------


@pages.post("/sign")
def sign() -> Redirect:
    guest = the_guest(request.form["name"])
    Session.add(Entry(text=request.form["text"], guest=guest))
    return redirect("/#sign", 303)


@pages.post("/crash")
def crash() -> str:
    Session.add(Entry(text="lost", guest=the_guest("Anonymous")))
    Session.flush()
    raise RuntimeError("a bug after the INSERT")


@pages.post("/stranger")
def stranger() -> str:
    Session.add(Entry(text="by an unknown guest", guest_id=-1))
    return "Thank you for your entry!"


@pages.post("/discard")
def discard() -> str:
    Session.add(Entry(text="lost", guest=the_guest("Anonymous")))
    Session.flush()
    Session.remove()  # copied from a tutorial: discards the entry
    return "Thank you for your entry!"


@pages.post("/stream")
def stream() -> Response:
    def lines() -> Iterator[str]:
        yield render_template("stream.html")
        for number in range(1, 6):
            line = f"line {number} of a stream"
            Session.add(Entry(text=line, guest=the_guest("Stream")))
            Session.flush()
            yield f"<p>{line} is written</p>\n"
            time.sleep(0.2)

    return Response(stream_with_context(lines()))


@pages.post("/hold")
def hold() -> Redirect:
    Session.scalars(select(Entry)).first()
    time.sleep(3)  # a call to a slow service, with a connection held
    return redirect("/#hold", 303)


# -- the page, the errors, the application --------------------------------------------------------


@pages.get("/")
def page() -> str:
    entries = Session.scalars(select(Entry).order_by(Entry.id.desc()).limit(10)).all()
    return render_template("page.html", entries=entries)


@pages.app_errorhandler(HTTPException)
def explain(error: HTTPException) -> tuple[str, int]:
    code = error.code or 500
    original = getattr(error, "original_exception", None)
    cause = "\n".join([str(original or error.description), *getattr(original, "__notes__", ())])
    what = f"The guestbook answered {code} {error.name}, so the middleware rolled back."
    return render_template("error.html", title=error.name, what=what, cause=cause), code


def create_app(url: str | None = None) -> Flask:
    """Make the application, for a database URL or for ``DATABASE_URL``."""
    engine = make_engine(url or os.environ.get("DATABASE_URL", "sqlite:///guestbook.db"))
    Base.metadata.create_all(engine)
    Session.session_factory.configure(bind=engine)

    app = Flask(__name__)
    app.register_blueprint(pages)

    def sorry(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        what = "The view returned a success, but the commit failed. The client gets this 500."
        words = {"title": "Not saved", "what": what, "cause": sys.exc_info()[1]}
        with app.app_context():
            body = render_template("error.html", environ=environ, **words)
        return Response(body, 500)(environ, start_response)

    middleware = SessionMiddleware(app.wsgi_app, Session, commit_error=sorry)
    # Your application ends here: `app.wsgi_app = middleware`. The rest is for the page.
    recorder = Recorder(middleware, engine)
    watch = app.extensions["watch"] = Watch(Session)
    app.wsgi_app = watch.board(recorder, "/_db")  # type: ignore[method-assign]
    app.jinja_env.globals.update(happened=recorder.last, source=source)
    return app


def source(name: str) -> str:
    """Return the code of a function of this module, for the page."""
    return inspect.getsource(globals()[name])
