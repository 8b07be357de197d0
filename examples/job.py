"""A script: ``python job.py`` works on the notes of the other examples.

Scripts, jobs and shells use the application's own registry; the block is the unit of work.
"""

import os
import threading

from sqlalchemy import create_engine, text
from sqlalchemy.orm import scoped_session, sessionmaker

from wsgi_dbsession import current_scope, session_scope

engine = create_engine(os.environ.get("DATABASE_URL", "sqlite:///notes.db"))
Session = scoped_session(sessionmaker(engine), scopefunc=current_scope)


@session_scope(Session)  # every call is a transaction
def remove_empty_notes() -> int:
    return len(Session.execute(text("DELETE FROM note WHERE text = '' RETURNING 1")).all())


def shout() -> None:
    with session_scope(Session) as scope:  # a thread opens its own scope
        scope.on_commit(lambda: print("the notes are loud now"))
        Session.execute(text("UPDATE note SET text = upper(text)"))


if __name__ == "__main__":
    print(remove_empty_notes(), "empty notes removed")
    thread = threading.Thread(target=shout)
    thread.start()
    thread.join()
    try:
        with session_scope(Session):
            Session.execute(text("DELETE FROM note"))
            raise RuntimeError("second thoughts")
    except RuntimeError:
        print("nothing was deleted")
