"""Pools and engines: of each kind, replaced, discovered late, and left as they were."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import NullPool, SingletonThreadPool, StaticPool

from tests.support.wsgi import make_registry
from wsgi_dbsession import current_scope, session_scope
from wsgi_dbsession.testing import isolate
from wsgi_dbsession.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Engine

SELECT = text("SELECT 1")
TO_REPLACE = ("do_execute", "do_executemany", "do_execute_no_params")


def test_a_pool_has_its_size_and_use(
    make_engine: Callable[..., Engine], make_watch: Callable[..., Watch]
) -> None:
    """Checked out, idle, and the most that it opens."""
    engine = make_engine(pool_size=2, max_overflow=3)
    watch = make_watch(make_registry(engine))
    with engine.connect(), engine.connect():
        pass
    with engine.connect():
        (use,) = watch.pools()

    assert use.name == f"sqlite {engine.url.database}"
    assert (use.kind, use.size, use.limit) == ("QueuePool", 2, 5)
    assert (use.checked_out, use.idle, use.waiting, use.timeouts) == (1, 1, 0, 0)


def test_a_pool_without_a_limit_says_so(
    make_engine: Callable[..., Engine], make_watch: Callable[..., Watch]
) -> None:
    """``max_overflow=-1`` has none."""
    watch = make_watch(make_registry(make_engine(pool_size=2, max_overflow=-1)))
    (use,) = watch.pools()

    assert (use.size, use.limit) == (2, None)


@pytest.mark.parametrize("kind", [NullPool, StaticPool, SingletonThreadPool])
def test_each_kind_of_pool_is_accounted_for(
    kind: type, make_engine: Callable[..., Engine], make_watch: Callable[..., Watch]
) -> None:
    """Those that do not count are counted by the watch."""
    registry = make_registry(make_engine(poolclass=kind))
    watch = make_watch(registry)
    with session_scope(registry, name="one"):
        registry.execute(SELECT)
        registry.execute(SELECT)
        (holder,), (use,) = watch.holders(), watch.pools()
    (ended,) = watch.ended()

    assert (holder.name, holder.statements) == ("one", 2)
    assert (use.kind, use.size, use.limit, use.checked_out) == (kind.__name__, None, None, 1)
    assert (ended.statements, ended.connections) == (2, 1)
    assert watch.holders() == []


def test_one_connection_for_a_thread_is_one_holder(
    make_engine: Callable[..., Engine], make_watch: Callable[..., Watch]
) -> None:
    """SingletonThreadPool gives a thread again what it holds."""
    engine = make_engine(poolclass=SingletonThreadPool)
    watch = make_watch(make_registry(engine))
    with engine.connect(), engine.connect() as second:
        second.execute(SELECT)
        assert len(watch.holders()) == 1


def test_one_connection_for_a_thread_belongs_to_the_outer_block(
    make_watch: Callable[..., Watch],
) -> None:
    """A nested block gets none from SingletonThreadPool, so it is left out."""
    registry = make_registry(create_engine("sqlite://"))
    watch = make_watch(registry)
    records: list[Any] = []
    watch.on_end(records.append)
    with session_scope(registry, name="outer"):
        registry.execute(SELECT)
        with session_scope(registry, name="inner"):
            registry.execute(SELECT)
        assert [(holder.name, holder.statements) for holder in watch.holders()] == [("outer", 2)]
    registry.session_factory.kw["bind"].dispose()

    assert watch.ended() == records
    assert [(ended.name, ended.connections) for ended in records] == [("outer", 1)]
    assert [place.scopes for place in watch.places()] == [1]


def test_one_connection_for_all_belongs_to_its_last_user(
    make_engine: Callable[..., Engine], make_watch: Callable[..., Watch]
) -> None:
    """StaticPool has one: who had it before is shown as ended."""
    engine = make_engine(poolclass=StaticPool, connect_args={"check_same_thread": False})
    registry = make_registry(engine)
    watch = make_watch(registry)

    def use() -> None:
        with session_scope(registry, name="second"):
            registry.execute(SELECT)
            seen.extend(watch.holders())

    seen: list[Any] = []
    with session_scope(registry, name="first"):
        registry.execute(SELECT)
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()

    assert [holder.name for holder in seen] == ["second"]
    assert [(ended.name, ended.statements) for ended in watch.ended()] == [
        ("first", 1),
        ("second", 1),
    ]


@pytest.fixture
def shared(make_engine: Callable[..., Engine]) -> scoped_session[Session]:
    """A session registry over one connection for all."""
    return make_registry(
        make_engine(poolclass=StaticPool, connect_args={"check_same_thread": False})
    )


def test_who_shares_a_connection_holds_it_again_after_a_nested_block(
    shared: scoped_session[Session], make_watch: Callable[..., Watch]
) -> None:
    """Each has its own statements, and returns the connection by itself."""
    watch = make_watch(shared)

    def held() -> list[tuple[str, int]]:
        assert [use.checked_out for use in watch.pools()] == [len(watch.holders())]
        return [(holder.name, holder.statements) for holder in watch.holders()]

    for _ in range(2):
        with session_scope(shared, name="outer"):
            shared.execute(SELECT)
            with session_scope(shared, name="middle"):
                shared.execute(SELECT)
                with session_scope(shared, name="inner"):
                    shared.execute(SELECT)
                    assert held() == [("inner", 1)]
                assert held() == [("middle", 1)]
            shared.execute(SELECT)
            assert held() == [("outer", 2)]
            shared.commit()
            assert held() == []
            shared.execute(SELECT)
            assert held() == [("outer", 1)]
        assert held() == []

    outer, middle, inner = watch.ended()[:3]
    assert (outer.connections, outer.statements) == (2, 3)
    assert (middle.connections, middle.statements) == (1, 1)
    assert (inner.connections, inner.statements) == (1, 1)
    assert outer.held_s > middle.held_s > inner.held_s > 0


def test_threads_that_share_a_connection_return_it_in_any_order(
    shared: scoped_session[Session], make_watch: Callable[..., Watch]
) -> None:
    """It is the account of the thread that returns it that ends."""
    watch = make_watch(shared)
    got, leave = threading.Event(), threading.Event()

    def use() -> None:
        with session_scope(shared, name="first"):
            shared.execute(SELECT)
            got.set()
            leave.wait(60)

    thread = threading.Thread(target=use)
    thread.start()
    assert got.wait(60)
    with session_scope(shared, name="second"):
        shared.execute(SELECT)
        leave.set()
        thread.join()
        assert [holder.name for holder in watch.holders()] == ["second"]

    assert watch.holders() == []
    assert [(ended.name, ended.connections) for ended in watch.ended()] == [
        ("second", 1),
        ("first", 1),
    ]


def test_a_shared_connection_that_is_invalidated_has_no_holder(
    shared: scoped_session[Session], make_watch: Callable[..., Watch]
) -> None:
    """It is closed under all who share it."""
    watch = make_watch(shared)
    engine: Engine = shared.session_factory.kw["bind"]
    with engine.connect(), engine.connect(), engine.connect() as third:
        assert len(watch.holders()) == 1
        third.invalidate()
        assert watch.holders() == []

    assert watch.holders() == []


def test_another_connection_is_returned_while_one_is_shared(
    engine: Engine,
    registry: scoped_session[Session],
    shared: scoped_session[Session],
    make_watch: Callable[..., Watch],
) -> None:
    """Each pool has its own holders."""
    watch = make_watch(shared, registry)
    with session_scope(shared, name="outer"):
        shared.execute(SELECT)
        with session_scope(shared, name="inner"):
            shared.execute(SELECT)
            with engine.connect():
                assert len(watch.holders()) == 2
            assert [holder.name for holder in watch.holders()] == ["inner"]
        assert [holder.name for holder in watch.holders()] == ["outer"]


def test_a_disposed_engine_is_watched_on(
    engine: Engine, registry: scoped_session[Session], watch: Watch
) -> None:
    """Its new pool takes the place of the old one."""
    with engine.connect():
        pass
    old = weakref.ref(engine.pool)
    engine.dispose()
    gc.collect()
    assert old() is None
    with engine.connect():
        assert [use.checked_out for use in watch.pools()] == [len(watch.holders())] == [1]

    for _ in range(2):
        with session_scope(registry, name="after"):
            registry.execute(SELECT)
            assert [holder.name for holder in watch.holders()] == ["after"]
            assert [use.checked_out for use in watch.pools()] == [1]
    assert [ended.statements for ended in watch.ended()] == [1, 1]


def test_an_engine_that_is_disposed_of_elsewhere_is_watched_on(
    engine: Engine, make_watch: Callable[..., Watch]
) -> None:
    """An engine with options shares the pool of the one that it was made from."""
    registry = make_registry(engine.execution_options(logging_token="x"))
    watch = make_watch(registry)
    engine.dispose()
    for _ in range(2):
        with session_scope(registry):
            registry.execute(SELECT)
            assert [use.checked_out for use in watch.pools()] == [1]


def test_an_engine_is_discovered_at_its_first_use(
    make_engine: Callable[..., Engine], make_watch: Callable[..., Watch]
) -> None:
    """A Session may choose its engine, and may be configured late."""
    registry = make_registry(None)
    watch = make_watch(registry)
    assert watch.pools() == []
    registry.configure(bind=make_engine())

    for _ in range(2):
        with session_scope(registry, name="late"):
            registry.execute(SELECT)
            (holder,) = watch.holders()
            assert holder.line.endswith("in test_an_engine_is_discovered_at_its_first_use")
            assert (holder.name, holder.statements) == ("late", 1)
    assert len(watch.pools()) == 1
    assert len(watch.ended()) == 2


def test_engines_of_tables_are_watched_from_the_beginning(
    make_engine: Callable[..., Engine], make_watch: Callable[..., Watch]
) -> None:
    """Those in ``binds``, and a second one of a registry's own."""
    one, two = make_engine(), make_engine()
    factory = sessionmaker(one, binds={int: two})
    watch = make_watch(scoped_session(factory, scopefunc=current_scope))

    assert len(watch.pools()) == 2


def test_two_engines_of_one_database_have_two_names(make_watch: Callable[..., Watch]) -> None:
    """Otherwise the page would show one name twice."""
    engines = [create_engine("sqlite://") for _ in range(3)]
    watch = make_watch(*map(make_registry, engines))

    assert [use.name for use in watch.pools()] == ["sqlite", "sqlite #2", "sqlite #3"]
    for engine in engines:
        engine.dispose()


def test_a_registry_that_is_given_twice_counts_once(
    registry: scoped_session[Session], make_watch: Callable[..., Watch]
) -> None:
    """It has one pool, and tells of one end."""
    watch = make_watch(registry, registry)
    with session_scope(registry):
        registry.execute(SELECT)

    assert len(watch.pools()) == len(watch.ended()) == 1


def test_a_connection_of_before_the_watch_is_found_by_its_next_transaction(
    registry: scoped_session[Session], make_watch: Callable[..., Watch]
) -> None:
    """Until then the watch does not know its holder."""
    with session_scope(registry, name="before"):
        connection = registry.connection()
        watch = make_watch(registry)
        assert watch.holders() == []
        registry.execute(SELECT)
        assert watch.holders() == []
        del connection
    with session_scope(registry, name="after"):
        registry.execute(SELECT)
        assert [holder.name for holder in watch.holders()] == ["after"]
    assert watch.holders() == []


def test_a_session_may_use_a_connection_of_before_the_watch(
    engine: Engine, make_watch: Callable[..., Watch]
) -> None:
    """It is accounted for from the Session's transaction on."""
    with engine.connect() as connection:
        registry = make_registry(connection)
        watch = make_watch(registry)
        with session_scope(registry, name="late"):
            registry.execute(SELECT)
            assert [holder.name for holder in watch.holders()] == ["late"]
    assert len(watch.pools()) == 1
    assert watch.holders() == []


def test_a_watch_that_is_closed_leaves_nothing(
    engine: Engine, registry: scoped_session[Session]
) -> None:
    """Pools, dialects and registries are as before, and may be watched again."""
    before = {name: getattr(engine.dialect, name) for name in TO_REPLACE}
    connect, dispose = engine.pool.connect, engine.dispose
    watch = Watch(registry)
    assert engine.pool.connect != connect
    with engine.connect() as connection:
        watch.close()
        connection.execute(SELECT)
    with session_scope(registry):
        registry.execute(SELECT)

    assert (engine.pool.connect, engine.dispose) == (connect, dispose)
    assert not engine._has_events  # or each statement would cost more
    assert {name: getattr(engine.dialect, name) for name in TO_REPLACE} == before
    assert (watch.holders(), watch.ended(), watch.pools()) == ([], [], [])
    assert registry.registry.observers == ()  # type: ignore[attr-defined]
    watch.close()


def test_what_was_put_around_the_watch_stays(
    engine: Engine, registry: scoped_session[Session]
) -> None:
    """Another tool may have replaced the same methods since."""
    watch = Watch(registry)
    watched = engine.pool.connect
    engine.pool.connect = lambda: watched()  # type: ignore[method-assign]
    others = engine.pool.connect
    watch.close()

    assert engine.pool.connect is others
    with engine.connect() as connection:
        connection.execute(SELECT)


def test_one_connection_of_a_test_is_outside_of_its_scopes(
    registry: scoped_session[Session], watch: Watch
) -> None:
    """``isolate`` holds it, and gives it to all scopes."""
    with isolate(registry):
        with session_scope(registry, name="inside"):
            registry.execute(SELECT)
            assert [holder.name for holder in watch.holders()] == ["outside of a scope"]
        assert watch.ended() == []

    assert watch.holders() == []


def test_a_watch_outlives_its_engine(make_watch: Callable[..., Watch]) -> None:
    """An engine that is gone is not kept alive, and not shown."""
    registry = make_registry(None)
    watch = make_watch(registry)
    for name in ("first", "second"):
        engine = create_engine("sqlite://")
        with session_scope(registry, name=name):
            registry.execute(SELECT, bind_arguments={"bind": engine})
        engine.dispose()
        assert [use.name for use in watch.pools()] == ["sqlite"]
        del engine
        gc.collect()
        assert watch.pools() == []

    assert [ended.statements for ended in watch.ended()] == [1, 1]


def test_two_watches_look_at_one_pool(
    engine: Engine, registry: scoped_session[Session], make_watch: Callable[..., Watch]
) -> None:
    """Each has its own account, in whatever order they are closed."""
    one, two = make_watch(registry), make_watch(registry)
    engine.dispose()
    with engine.connect():
        assert [len(each.holders()) for each in (one, two)] == [1, 1]
    with session_scope(registry, name="both"):
        registry.execute(SELECT)
        assert [len(each.holders()) for each in (one, two)] == [1, 1]
    one.close()
    with session_scope(registry, name="the second"):
        registry.execute(SELECT)
        assert [len(each.holders()) for each in (one, two)] == [0, 1]
    engine.dispose()
    with engine.connect():
        assert [len(each.holders()) for each in (one, two)] == [0, 1]

    assert [len(each.holders()) for each in (one, two)] == [0, 0]
    assert [len(each.ended()) for each in (one, two)] == [1, 2]


@pytest.mark.parametrize(
    ("registries", "error", "message"),
    [
        pytest.param((), ValueError, "must not be empty", id="none"),
        pytest.param((Session,), TypeError, "must be a scoped_session", id="a Session"),
    ],
)
def test_a_watch_needs_a_registry(
    registries: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    """It is refused as by the middleware."""
    with pytest.raises(error, match=message):
        Watch(*registries)
