"""The application that real servers run: each client adds notes of its own, and counts them."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from sqlalchemy import create_engine, func, select
from sqlalchemy.orm import scoped_session, sessionmaker

from tests.replica.application import PORT
from tests.replica.site import SECRET
from tests.replica.tables import Note
from wsgi_dbsession import SessionMiddleware, current_scope
from wsgi_dbsession.replica import Replicas, read_only_engine
from wsgi_dbsession.retry import RetryMiddleware

if TYPE_CHECKING:
    from collections.abc import Iterable

    from _typeshed.wsgi import StartResponse, WSGIEnvironment

primary, *standbys = json.loads(os.environ["DATABASES"])
replicas = Replicas(
    create_engine(primary, pool_size=20),
    [read_only_engine(url, pool_size=20) for url in standbys],
    secret=SECRET,
    pause=0.5,
)
Session = scoped_session(sessionmaker(class_=replicas.Session), scopefunc=current_scope)


def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    client = environ["PATH_INFO"]
    if environ["REQUEST_METHOD"] == "POST":
        Session.add(Note(text=client))
        body = ""
    else:
        count = Session.scalar(select(func.count()).where(Note.text == client))
        body = f"{count} {Session.scalar(PORT)}"
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [body.encode()]


application = replicas.wrap(
    RetryMiddleware(SessionMiddleware(app, Session), attempts=5, retry_connect=True)
)
