"""The response: stored before its outcome, in every shape, and changed in none."""

from __future__ import annotations

import contextlib
import gc
import io
import weakref
from typing import TYPE_CHECKING, Any
from wsgiref.util import FileWrapper
from wsgiref.validate import validator

import pytest
from sqlalchemy import event

from tests.idempotency.shop import KEY, KEYS, Note, Shop, order, protect, user_of
from tests.support.errors import AppError, Kill, raise_error
from tests.support.moments import MOMENTS
from tests.support.wsgi import BODIES, Program, Server, make_environ
from wsgi_dbsession import SessionMiddleware
from wsgi_dbsession.idempotency import Idempotency

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from sqlalchemy.orm import Session, scoped_session

    from tests.idempotency.shop import Place

TEXT = ("Content-Type", "text/plain")
# A stream without a length may be endless, so it is not held back to be stored.
STREAMS = (
    "file wrapper",
    "sized iterable",
    "list subclass",
    "unsized generator",
    "generator application",
    "iterator without close",
)


def writing(registry: scoped_session[Session], text: str) -> Callable[[], None]:
    def write() -> None:
        registry.add(Note(text=text))
        registry.flush()

    return write


def program_of(registry: scoped_session[Session], **more: Any) -> Program:
    """Make a program that writes early, late and last."""
    moments = {name: writing(registry, name) for name in ("early", "late", "last")}
    return Program(**{**moments, **more})


# -- shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("shape", BODIES)
def test_a_body_of_any_shape_with_a_length_is_replayed(
    shape: str, moment: Any, registry: scoped_session[Session], sqlite: Place
) -> None:
    """Whenever the outcome comes."""
    program = program_of(registry)
    program.headers = program.with_length()
    app = committing_on(moment, BODIES[shape](program), registry)

    first = order(app)
    again = order(app)

    assert (first.status, first.body) == (again.status, again.body) == ("200 OK", b"onetwo")
    assert again.is_replayed
    assert sqlite.notes() == ["early", "last", "late"]
    assert again.headers == {
        "Content-Type": "a/b",
        "Content-Length": "6",
        "Idempotent-Replayed": "true",
    }


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("shape", BODIES)
def test_a_body_of_any_shape_without_a_length_takes_effect_once(
    shape: str, moment: Any, registry: scoped_session[Session], sqlite: Place
) -> None:
    """A list, a tuple and ``write()`` are replayed; a stream is done, and says so."""
    app = committing_on(moment, BODIES[shape](program_of(registry)), registry)

    first = order(app)
    again = order(app)

    assert (first.status, first.body) == ("200 OK", b"onetwo")
    assert sqlite.notes() == ["early", "last", "late"]
    if shape in STREAMS:
        assert (again.status, again.code) == ("409 Conflict", "not_stored")
        assert b"200 OK" in again.body
    else:
        assert (again.status, again.body, again.is_replayed) == ("200 OK", b"onetwo", True)


def committing_on(
    moment: Any, app: WSGIApplication, registry: scoped_session[Session]
) -> WSGIApplication:
    inner = Idempotency(app, registry, KEYS, principal=user_of)
    return SessionMiddleware(inner, registry, commit_on=moment)


@pytest.mark.parametrize("shape", BODIES)
@pytest.mark.parametrize("with_length", [True, False], ids=["length", "no length"])
def test_an_iterable_is_closed_once_and_last(
    shape: str, with_length: bool, registry: scoped_session[Session]
) -> None:
    """By the server, after everything was sent."""
    server = Server()
    program = Program(closing=lambda: server.trace.append("close"))
    if with_length:
        program.headers = program.with_length()

    server.run(
        protect(BODIES[shape](program), registry),
        make_environ("POST", HTTP_IDEMPOTENCY_KEY=KEY),
    )

    if program.closed:
        assert program.closed == 1
        assert server.trace.index("close") > server.trace.index(
            "block two" if "block two" in server.trace else "block onetwo"
        )
    assert server.body == b"onetwo"


@pytest.mark.parametrize("shape", BODIES)
@pytest.mark.parametrize("with_length", [True, False], ids=["length", "no length"])
def test_both_sides_keep_to_pep_3333(
    shape: str, with_length: bool, registry: scoped_session[Session]
) -> None:
    """``wsgiref.validate`` has nothing to say, of the first response or of its replay."""
    program = Program(headers=[TEXT])
    if with_length:
        program.headers = program.with_length()
    app = validator(protect(validator(BODIES[shape](program)), registry))

    for _ in range(2):
        environ = make_environ("POST", HTTP_IDEMPOTENCY_KEY=KEY, SERVER_PROTOCOL="HTTP/1.1")
        environ.pop("wsgi.file_wrapper")
        if shape == "file wrapper":
            environ["wsgi.file_wrapper"] = lambda file, size: iter(lambda: file.read(size), b"")
        Server().run(app, environ)


@pytest.mark.parametrize("shape", ["list body", "tuple body", "file wrapper"])
def test_the_server_gets_the_object_that_the_application_returned(
    shape: str, registry: scoped_session[Session]
) -> None:
    """A server sends a list at once, and a file by ``sendfile``."""
    program = Program()
    returned: list[object] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        result = BODIES[shape](program)(environ, start_response)
        returned.append(result)
        return result

    environ = make_environ("POST", HTTP_IDEMPOTENCY_KEY=KEY)

    result = protect(app, registry)(environ, Server().start_response)

    assert result is returned[0]


def test_a_stream_is_not_read_ahead(registry: scoped_session[Session]) -> None:
    """A block is sent before the next one is made."""
    server = Server()

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [TEXT])

        def blocks() -> Iterator[bytes]:
            for number in range(3):
                server.trace.append(f"make {number}")
                yield b"%d" % number

        return blocks()

    server.run(protect(app, registry), make_environ("POST", HTTP_IDEMPOTENCY_KEY=KEY))

    assert server.trace == [
        *("make 0", "start 200", "block 0", "make 1", "block 1", "make 2", "block 2", "end"),
    ]


def test_what_follows_the_whole_body_is_not_waited_for(registry: scoped_session[Session]) -> None:
    """A generator with a length is read until the length is reached, and goes on later."""
    server = Server()

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [TEXT, ("Content-Length", "2")])
        yield b"a"
        yield b"b"
        server.trace.append("afterwards")

    protected = protect(app, registry)
    environ = make_environ("POST", "/orders", b"tea", HTTP_IDEMPOTENCY_KEY=KEY)
    server.run(protected, environ)

    assert server.trace == ["start 200", "block a", "block b", "afterwards", "end"]
    assert order(protected).body == b"ab"


@pytest.mark.parametrize("wrap", [FileWrapper, lambda file, size: file], ids=["class", "uWSGI"])
def test_a_long_file_is_left_to_the_server(wrap: Any, registry: scoped_session[Session]) -> None:
    """Also where ``wsgi.file_wrapper`` is a function that returns the file."""
    file = io.BytesIO(b"long")

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [TEXT, ("Content-Length", "4")])
        result: Iterable[bytes] = environ["wsgi.file_wrapper"](file, 2)
        return result

    protected = protect(app, registry, max_response=3)
    environ = make_environ("POST", HTTP_IDEMPOTENCY_KEY=KEY, **{"wsgi.file_wrapper": wrap})
    result: Any = protected(environ, Server().start_response)

    assert (result if wrap is not FileWrapper else result.filelike) is file
    assert order(protected, path="/", body=b"").code == "not_stored"


# -- rollbacks by the application, in the midst of the response -----------------------------------


def starting_over(registry: scoped_session[Session], *, after: int, closing: bool) -> Any:
    """Make a body that rolls back after some blocks, or when it is closed, and writes anew."""

    class Blocks:
        def __iter__(self) -> Iterator[bytes]:
            for number, block in enumerate((b"a", b"b", b"c")):
                if number == after:
                    self.start_over()
                yield block
            if after == 3:
                self.start_over()

        def start_over(self) -> None:
            registry.rollback()
            registry.add(Note(text="anew"))
            registry.flush()

        def close(self) -> None:
            if closing:
                self.start_over()

    return Blocks()


@pytest.mark.parametrize(
    ("moment", "after", "closing"),
    [
        *(pytest.param("complete", after, False, id=f"after {after} blocks") for after in (1, 2)),
        pytest.param("close", 3, False, id="after the last block, before the outcome"),
        pytest.param("close", -1, True, id="in close(), before the outcome"),
    ],
)
@pytest.mark.parametrize("length", [None, "3", "long"])
def test_a_rollback_in_the_midst_of_the_response_does_no_harm(
    length: str | None,
    moment: Any,
    after: int,
    closing: bool,
    registry: scoped_session[Session],
    sqlite: Place,
) -> None:
    """The row is stored again, with what is committed in the end."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        registry.add(Note(text="in vain"))
        headers = [TEXT] if length is None else [TEXT, ("Content-Length", "3")]
        start_response("200 OK", headers)
        body: Iterable[bytes] = starting_over(registry, after=after, closing=closing)
        return body

    inner = Idempotency(
        app, registry, KEYS, principal=user_of, max_response=2 if length == "long" else 9
    )
    protected = SessionMiddleware(inner, registry, commit_on=moment)
    first = order(protected)
    again = order(protected)

    assert first.body == b"abc"
    assert sqlite.notes() == ["anew"]
    if length == "3":
        assert (again.is_replayed, again.body) == (True, b"abc")
    else:
        assert again.code == "not_stored"


def test_a_rollback_before_the_end_of_a_stream_does_no_harm(
    registry: scoped_session[Session], sqlite: Place
) -> None:
    """The outcome comes at the end, after the last block."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [TEXT])
        body: Iterable[bytes] = starting_over(registry, after=3, closing=False)
        return body

    protected = protect(app, registry)
    order(protected)

    assert order(protected).code == "not_stored"
    assert sqlite.notes() == ["anew"]


@pytest.mark.parametrize("shape", [name for name in BODIES if name != "write()"])
@pytest.mark.parametrize("with_length", [True, False], ids=["length", "no length"])
def test_a_response_is_stored_once(
    shape: str, with_length: bool, registry: scoped_session[Session], sqlite: Place
) -> None:
    """A request costs an INSERT and an UPDATE, however many blocks it has."""
    program = Program()
    if with_length:
        program.headers = program.with_length()
    statements: list[str] = []
    event.listen(
        sqlite.engines[0],
        "before_cursor_execute",
        lambda *arguments: statements.append(arguments[2].split()[0]),
    )

    order(protect(BODIES[shape](program), registry))

    assert statements == ["BEGIN", "INSERT", "UPDATE"]


def test_a_key_that_is_taken_in_the_midst_of_the_response_cuts_it(
    registry: scoped_session[Session], sqlite: Place
) -> None:
    """Nothing of this request is committed, and the client sees that it failed."""
    winner = protect(Shop(registry), registry)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [TEXT])
        yield b"a"
        registry.rollback()
        assert order(winner).status == "201 Created"
        registry.add(Note(text="too late"))
        yield b"b"

    with pytest.raises(Exception, match="took the Idempotency-Key"):
        order(protect(app, registry))

    assert sqlite.notes() == ["tea"]


def test_a_stream_that_fails_stores_nothing(
    registry: scoped_session[Session], sqlite: Place
) -> None:
    """Its error is the one that is raised."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [TEXT])
        yield b"a"
        registry.rollback()
        registry.add(Note(text="too late"))
        registry.flush()
        raise AppError

    with pytest.raises(AppError):
        order(protect(app, registry))
    assert (sqlite.notes(), sqlite.keys()) == ([], [])


# -- errors ---------------------------------------------------------------------------------------


def test_a_response_that_is_replaced_is_stored_as_it_was_sent(
    registry: scoped_session[Session],
) -> None:
    """A second start, with the error that led to it."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [TEXT])
        try:
            raise_error()
        except AppError as error:
            exc_info = (type(error), error, error.__traceback__)
            start_response("202 Accepted", [TEXT], exc_info)  # type: ignore[arg-type]
        return [b"instead"]

    protected = protect(app, registry)
    order(protected)
    again = order(protected)

    assert (again.status, again.body) == ("202 Accepted", b"instead")


def test_a_second_start_without_an_error_is_refused(registry: scoped_session[Session]) -> None:
    """As SessionMiddleware does; nothing is stored."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [TEXT])
        start_response("200 OK", [TEXT])
        return [b""]

    with pytest.raises(AssertionError, match="start_response"):
        order(protect(app, registry))


def silent(kind: Any) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        result: Iterable[bytes] = kind([b"x"])
        return result

    return app


@pytest.mark.parametrize("kind", [list, tuple, iter, lambda blocks: iter(())])
def test_a_body_without_a_start_is_refused(
    kind: Any, registry: scoped_session[Session], sqlite: Place
) -> None:
    """As SessionMiddleware does; nothing is stored."""
    with pytest.raises(AssertionError, match="start_response"):
        order(protect(silent(kind), registry))
    assert sqlite.keys() == []


class Body:
    """An iterable that fails, and may fail again when it is closed."""

    def __init__(self, error: BaseException, closing: BaseException | None = None) -> None:
        self.error = error
        self.closing = closing
        self.closed = 0

    def __iter__(self) -> Iterator[bytes]:
        yield b"a"
        raise self.error

    def close(self) -> None:
        self.closed += 1
        if self.closing is not None:
            raise self.closing


@pytest.mark.parametrize("error", [AppError(), Kill()], ids=["error", "interruption"])
@pytest.mark.parametrize("closing", [None, AppError("late")], ids=["closed", "not even closed"])
def test_a_body_that_fails_while_it_is_recorded_is_closed(
    error: BaseException,
    closing: BaseException | None,
    registry: scoped_session[Session],
    sqlite: Place,
) -> None:
    """The first error is raised, and nothing is stored."""
    body = Body(error, closing)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [TEXT, ("Content-Length", "9")])
        return body

    with pytest.raises(type(error)) as caught:
        order(protect(app, registry))

    assert caught.value is error
    assert body.closed == 1
    assert sqlite.keys() == []


class Failing:
    """An iterable that fails, and does not hold the error."""

    def __iter__(self) -> Iterator[bytes]:
        yield b"a"
        raise AppError


def no_failure(registry: scoped_session[Session]) -> None:
    """Leave it to the body."""


def lose_the_key(registry: scoped_session[Session]) -> None:
    """Let another request take it."""
    registry.rollback()
    order(protect(Shop(registry), registry))


@pytest.mark.parametrize("failure", [no_failure, lose_the_key])
def test_nothing_is_kept_after_a_failure(failure: Any, postgres: Place) -> None:
    """No cycle holds the request until a collection; errors of SQLAlchemy are in one."""
    registry = postgres.registry()
    kept: list[weakref.ref[Failing]] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        body = Failing()
        kept.append(weakref.ref(body))
        failure(registry)
        length = "9" if failure is no_failure else "1"
        start_response("200 OK", [TEXT, ("Content-Length", length)])
        return body

    protected = protect(app, registry)
    order(protect(Shop(registry), registry), key="warm")
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(AppError):
            # Not order(): it keeps what start_response is called with.
            protected(make_environ("POST", HTTP_IDEMPOTENCY_KEY=KEY), lambda *_: bytes)
            assert failure is lose_the_key
        assert kept[0]() is None
    finally:
        gc.enable()
