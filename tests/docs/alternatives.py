"""What the alternatives do in the situations of docs/why.md.

``python -m tests.docs.alternatives`` writes the table anew; a test compares it with what it sees.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import flask
import flask_sqlalchemy
import flask_sqlalchemy_lite
import pyramid.config
import pyramid.response
import repoze.tm
import zope.sqlalchemy
from sqlalchemy import delete, event, select, text
from sqlalchemy.orm import scoped_session, sessionmaker

from tests.docs.pages import DOCS
from tests.frameworks.scenarios import describe
from tests.frameworks.server import Client
from tests.frameworks.tables import write
from tests.support import models
from tests.support.models import Base, Book, Database, Note, make_database
from wsgi_dbsession import SessionMiddleware, current_scope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import TypeAlias

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from sqlalchemy import Engine
    from sqlalchemy.orm import Session

    #: returns the Session of the request
    Find: TypeAlias = Callable[[], Session]
    #: commits it, where the alternative wants its user to
    End: TypeAlias = Callable[[], object]

DOCUMENT = DOCS / "why.md"


def forget(session: Session, commit: End) -> Iterable[bytes]:
    session.add(Note(text="written"))
    return [b"saved"]


def fail(session: Session, commit: End) -> Iterable[bytes]:
    session.add_all([Note(text="written"), Book(author_id=99)])
    commit()
    return [b"saved"]


def commit_twice(session: Session, commit: End) -> Iterable[bytes]:
    session.add(Note(text="written"))
    commit()
    raise LookupError("between two commits")


def execute(session: Session, commit: End) -> Iterable[bytes]:
    session.execute(text("INSERT INTO note (text) VALUES ('written')"))
    commit()
    return [b"saved"]


def read_late(session: Session, commit: End) -> Iterable[bytes]:
    session.add(Note(text="written"))
    commit()

    def blocks() -> Iterator[bytes]:
        yield b"first"
        yield from (note.text.encode() for note in session.scalars(select(Note)))

    return blocks()


def fail_late(session: Session, commit: End) -> Iterable[bytes]:
    session.add(Note(text="written"))
    commit()

    def blocks() -> Iterator[bytes]:
        yield b"first"
        raise LookupError("in the middle")

    return blocks()


VIEWS = {
    "/forget": forget,
    "/fail": fail,
    "/twice": commit_twice,
    "/text": execute,
    "/read": read_late,
    "/late": fail_late,
}
SITUATIONS = {
    "a view forgets to commit": "/forget",
    "the commit fails": "/fail",
    "a view commits twice, and raises in between": "/twice",
    "a view uses textual SQL": "/text",
    "a stream reads from the Session": "/read",
    "a stream raises in the middle": "/late",
}


def nothing() -> None:
    """Commit nothing: the alternative does it by itself."""


# -- the frameworks around the views --------------------------------------------------------------


def in_flask(app: flask.Flask, find: Find, end: Find | None) -> flask.Flask:
    """Add the views to a Flask application."""

    @app.post("/<path:path>")
    def view(path: str) -> flask.Response:
        session = find()
        blocks = VIEWS[f"/{path}"](session, session.commit if end is find else nothing)
        return app.response_class(blocks, status=201)

    return app


def bare(find: Find) -> WSGIApplication:
    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        blocks = VIEWS[environ["PATH_INFO"]](find(), nothing)
        headers = [("Content-Type", "text/plain")]
        if isinstance(blocks, list):  # as every framework does
            headers.append(("Content-Length", str(sum(map(len, blocks)))))
        start_response("201 Created", headers)
        return blocks

    return application


# -- the alternatives -----------------------------------------------------------------------------


class Made(NamedTuple):
    """An application, and the engines to dispose of."""

    app: WSGIApplication
    engine: Engine | None = None


def thread_local(database: Database) -> Made:
    """As in Flask's documentation."""
    registry = scoped_session(sessionmaker(database.engine))
    app = in_flask(flask.Flask(__name__), registry, registry)
    app.teardown_appcontext(lambda _: registry.remove())
    return Made(app)


def with_flask_sqlalchemy(database: Database) -> Made:
    db = flask_sqlalchemy.SQLAlchemy(model_class=Base)
    app = flask.Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = str(database.url)
    db.init_app(app)
    with app.app_context():
        engine = set_up(db.engine)
    return Made(in_flask(app, db.session, db.session), engine)


def with_flask_sqlalchemy_lite(database: Database) -> Made:
    db = flask_sqlalchemy_lite.SQLAlchemy()
    app = flask.Flask(__name__)
    app.config["SQLALCHEMY_ENGINES"] = {"default": str(database.url)}
    db.init_app(app)
    with app.app_context():
        engine = set_up(db.engine)
    find = db.get_session
    return Made(in_flask(app, find, find), engine)


def set_up(engine: Engine) -> Engine:
    """Make an engine check foreign keys, as those of the tests do."""
    event.listen(engine, "connect", models._set_up_sqlite)
    event.listen(engine, "begin", models._begin_sqlite)
    engine.dispose()
    return engine


def with_pyramid_tm(database: Database) -> Made:
    """As Pyramid's starter has it."""
    factory = sessionmaker(database.engine)

    def find(request: Any) -> Session:
        session = factory()
        zope.sqlalchemy.register(session, transaction_manager=request.tm)
        return session

    def view(request: Any) -> Any:
        blocks = VIEWS[request.path](request.dbsession, nothing)
        return pyramid.response.Response(status=201, app_iter=blocks)

    settings = {"tm.manager_hook": "pyramid_tm.explicit_manager"}
    with pyramid.config.Configurator(settings=settings) as config:
        config.include("pyramid_tm")
        config.add_request_method(find, "dbsession", reify=True)
        config.add_route("all", "/*rest")
        config.add_view(view, route_name="all")
        return Made(config.make_wsgi_app())


def with_repoze_tm(database: Database) -> Made:
    registry = scoped_session(sessionmaker(database.engine))
    zope.sqlalchemy.register(registry)
    return Made(repoze.tm.TM(bare(registry), repoze.tm.default_commit_veto))


def ours(database: Database) -> Made:
    registry = scoped_session(sessionmaker(database.engine), scopefunc=current_scope)
    app = in_flask(flask.Flask(__name__), registry, None)
    return Made(SessionMiddleware(app, registry))


ALTERNATIVES: dict[str, Callable[[Database], Made]] = {
    "thread-local registry, teardown": thread_local,
    "Flask-SQLAlchemy": with_flask_sqlalchemy,
    "Flask-SQLAlchemy-Lite": with_flask_sqlalchemy_lite,
    "pyramid_tm": with_pyramid_tm,
    "repoze.tm2": with_repoze_tm,
    "wsgi_dbsession": ours,
}


def see(alternative: str, situation: str, database: Database) -> str:
    """Send a request, and say what the client got and what became of the work."""
    made = ALTERNATIVES[alternative](database)
    try:
        answer = Client(made.app).send("POST", SITUATIONS[situation])
        notes = database.notes()
    finally:
        # SQLite keeps the transaction of a COMMIT that failed, and the pool keeps its connection.
        for engine in {database.engine, made.engine or database.engine}:
            engine.dispose()
        with database.observer.begin() as connection:
            connection.execute(delete(Note))
    length = dict(answer.headers).get("Content-Length")
    whole = answer.whole or length == str(len(answer.body))
    if whole:  # what is raised after that comes too late for the client
        answer.error = None
    words = describe(answer, notes)
    if whole and answer.code < 300:
        return words.replace("rolled back", "**lost**")
    return words.replace("committed", "**committed**")


def see_all(database: Database) -> list[list[str]]:
    """Return the rows of the table, the header first."""
    rows = [["", *ALTERNATIVES]]
    for situation in SITUATIONS:
        rows.append([situation, *(see(each, situation, database) for each in ALTERNATIVES)])
    return rows


def main() -> None:
    """Write the table into the document."""
    with tempfile.TemporaryDirectory() as folder:
        database = make_database(f"sqlite:///{Path(folder) / 'why.db'}")
        Base.metadata.create_all(database.observer)
        rows = see_all(database)
        database.engine.dispose()
    document = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(write(document, {"alternatives": rows}), encoding="utf-8")


if __name__ == "__main__":
    main()
