"""The engine and the session, as Flask's documentation has them."""

import os

from sqlalchemy import create_engine
from sqlalchemy.orm import declarative_base, scoped_session, sessionmaker

engine = create_engine(os.environ["DATABASE_URL"])
db_session = scoped_session(sessionmaker(autoflush=False, bind=engine))
Base = declarative_base()
Base.query = db_session.query_property()


def init_db():
    import models  # noqa: F401

    Base.metadata.create_all(bind=engine)
