"""Flask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import flask
import flask_sqlalchemy
import flask_sqlalchemy_lite
from sqlalchemy.orm import scoped_session, sessionmaker

from benchmarks.applications.common import (
    BIG,
    DATABASE_ROUTES,
    SELECT,
    Base,
    Operation,
    Run,
    _create_tables,
    blocks,
    by_hand,
    committing,
    endless,
    engine_options,
    our_registry,
    plain,
    watched,
)
from wsgi_dbsession import SessionMiddleware

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication
    from sqlalchemy import Engine


def flask_application(run: Run | None, app: flask.Flask | None = None) -> flask.Flask:
    if app is None:
        app = flask.Flask(__name__)

    @app.get("/")
    def as_list() -> str:
        return "hello"

    @app.get("/stream")
    def stream() -> Any:
        return blocks("hello"), 200, {"Content-Type": "text/plain"}

    if run is None:
        return app

    def add(path: str, operation: Operation) -> None:
        app.add_url_rule(path, path.strip("/"), lambda: run(operation))

    for path, operation in DATABASE_ROUTES.items():
        add(path, operation)

    @app.get("/big")
    def big() -> bytes:
        run(SELECT)
        return BIG

    @app.get("/big-stream")
    def big_stream() -> Any:
        return endless(run(SELECT)), 200, {"Content-Type": "text/plain"}

    return app


def flask_none(engine: Engine) -> WSGIApplication:
    return flask_application(None)


def flask_by_hand(engine: Engine) -> WSGIApplication:
    return flask_application(by_hand(engine))


def flask_thread_local(engine: Engine) -> WSGIApplication:
    registry = scoped_session(sessionmaker(engine))
    app = flask_application(committing(registry))

    @app.teardown_appcontext
    def remove_session(_: BaseException | None) -> None:
        registry.remove()

    return app


def flask_sqlalchemy_3(engine: Engine) -> WSGIApplication:
    database = flask_sqlalchemy.SQLAlchemy(model_class=Base)
    app = flask.Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = engine.url
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = engine_options(engine)
    database.init_app(app)
    with app.app_context():
        _create_tables(database.engine)
    return flask_application(committing(database.session), app)


def flask_sqlalchemy_lite_0(engine: Engine) -> WSGIApplication:
    database = flask_sqlalchemy_lite.SQLAlchemy()
    app = flask.Flask(__name__)
    app.config["SQLALCHEMY_ENGINES"] = {
        "default": {"url": engine.url, **engine_options(engine)},
    }
    database.init_app(app)
    with app.app_context():
        _create_tables(database.engine)

    def run(operation: Operation) -> str:
        # Its `session` is a property that finds the Session of the application context.
        session = database.session
        text = operation.call(session)
        if operation.writes:
            session.commit()
        return text

    return flask_application(run, app)


def flask_ours(engine: Engine) -> WSGIApplication:
    registry = our_registry(engine)
    app = flask_application(plain(registry))
    app.wsgi_app = SessionMiddleware(app.wsgi_app, registry)  # type: ignore[method-assign]
    return app


def flask_watched(engine: Engine) -> WSGIApplication:
    registry = our_registry(engine)
    app = flask_application(plain(registry))
    app.wsgi_app = watched(  # type: ignore[method-assign]
        SessionMiddleware(app.wsgi_app, registry), registry
    )
    return app
