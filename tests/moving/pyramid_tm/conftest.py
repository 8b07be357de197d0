"""Fixtures in the manner of Pyramid's starter: the work of a test is never committed."""

import os

import pytest
import transaction
import webtest
from app import Base, get_tm_session, main
from sqlalchemy import create_engine


@pytest.fixture(scope="session")
def app():
    url = os.environ["DATABASE_URL"]
    engine = create_engine(url)
    Base.metadata.create_all(engine)
    engine.dispose()
    return main({}, **{"sqlalchemy.url": url})


@pytest.fixture
def tm():
    tm = transaction.TransactionManager(explicit=True)
    tm.begin()
    tm.doom()
    yield tm
    tm.abort()


@pytest.fixture
def dbsession(app, tm):
    return get_tm_session(app.registry["dbsession_factory"], tm)


@pytest.fixture
def testapp(app, tm, dbsession):
    environ = {"tm.active": True, "tm.manager": tm, "app.dbsession": dbsession}
    return webtest.TestApp(app, extra_environ=environ)
