"""All applications, by framework and peer."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from benchmarks.applications.bare import (
    bare_by_hand,
    bare_none,
    bare_ours,
    bare_ours_on_headers,
    bare_repoze_tm,
    bare_thread_local,
    bare_watched,
)
from benchmarks.applications.bottle import (
    bottle_by_hand,
    bottle_none,
    bottle_ours,
    bottle_sqlalchemy_0,
)
from benchmarks.applications.common import (
    BY_HAND,
    NONE,
    OURS,
    THREAD_LOCAL,
    WATCHED,
    make_engine,
)
from benchmarks.applications.falcon import falcon_by_hand, falcon_none, falcon_ours, falcon_sqla_0
from benchmarks.applications.flask import (
    flask_by_hand,
    flask_none,
    flask_ours,
    flask_sqlalchemy_3,
    flask_sqlalchemy_lite_0,
    flask_thread_local,
    flask_watched,
)
from benchmarks.applications.pyramid import (
    pyramid_by_hand,
    pyramid_none,
    pyramid_ours,
    pyramid_tm_2,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed.wsgi import WSGIApplication
    from sqlalchemy import Engine


APPLICATIONS: dict[str, dict[str, Callable[[Engine], WSGIApplication]]] = {
    "bare WSGI": {
        NONE: bare_none,
        BY_HAND: bare_by_hand,
        THREAD_LOCAL: bare_thread_local,
        "repoze.tm2": bare_repoze_tm,
        OURS: bare_ours,
    },
    "Flask": {
        NONE: flask_none,
        BY_HAND: flask_by_hand,
        THREAD_LOCAL: flask_thread_local,
        "Flask-SQLAlchemy": flask_sqlalchemy_3,
        "Flask-SQLAlchemy-Lite": flask_sqlalchemy_lite_0,
        OURS: flask_ours,
    },
    "Bottle": {
        NONE: bottle_none,
        BY_HAND: bottle_by_hand,
        "bottle-sqlalchemy": bottle_sqlalchemy_0,
        OURS: bottle_ours,
    },
    "Falcon": {
        NONE: falcon_none,
        BY_HAND: falcon_by_hand,
        "falcon-sqla": falcon_sqla_0,
        OURS: falcon_ours,
    },
    "Pyramid": {
        NONE: pyramid_none,
        BY_HAND: pyramid_by_hand,
        "pyramid_tm": pyramid_tm_2,
        OURS: pyramid_ours,
    },
}

# Only where connections are held: what one chooses for long streams.
STREAMING = f'{OURS}, commit_on="headers"'
# And only where instructions are counted, what a watch adds.
VARIANTS = {
    "bare WSGI": {STREAMING: bare_ours_on_headers, WATCHED: bare_watched},
    "Flask": {WATCHED: flask_watched},
}


def make_application(framework: str, peer: str, engine: Engine) -> WSGIApplication:
    return {**APPLICATIONS[framework], **VARIANTS.get(framework, {})}[peer](engine)


def application_for_server() -> WSGIApplication:
    """Make what the environment variables say, in the process of a server."""
    engine = make_engine(os.environ["BENCHMARK_URL"], int(os.environ["BENCHMARK_POOL_SIZE"]))
    return make_application(
        os.environ["BENCHMARK_FRAMEWORK"], os.environ["BENCHMARK_PEER"], engine
    )
