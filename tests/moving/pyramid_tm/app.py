"""A shop, in the manner of Pyramid's starter: pyramid_tm and zope.sqlalchemy."""

import transaction
import zope.sqlalchemy
from pyramid.config import Configurator
from pyramid.httpexceptions import HTTPConflict, HTTPCreated, HTTPNotFound
from sqlalchemy import ForeignKey, engine_from_config, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, configure_mappers, mapped_column, sessionmaker


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "item"
    name: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int]


class Order(Base):
    __tablename__ = "order"
    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str] = mapped_column(ForeignKey("item.name"))


mails = []


def get_tm_session(session_factory, transaction_manager):
    dbsession = session_factory()
    zope.sqlalchemy.register(dbsession, transaction_manager=transaction_manager)
    return dbsession


def send_mail(success, order_id):
    if success:
        mails.append(f"order {order_id}")


def order(request):
    item = request.dbsession.get(Item, request.POST["item"])
    if item is None:
        raise HTTPNotFound
    item.number -= 1
    placed = Order(item=item.name)
    request.dbsession.add(placed)
    request.dbsession.flush()
    request.tm.get().addAfterCommitHook(send_mail, args=(placed.id,))
    if item.number < 0:
        request.tm.doom()
        return HTTPConflict()
    return HTTPCreated()


def restock(request):
    request.dbsession.execute(
        text("UPDATE item SET number = number + 10 WHERE name = :name"),
        {"name": request.POST["item"]},
    )
    return HTTPCreated()


def items(request):
    lines = (f"{item.name}\n".encode() for item in request.dbsession.scalars(select(Item)))
    request.response.app_iter = lines
    return request.response


def add_item(session_factory, name, number):
    with transaction.manager:
        dbsession = get_tm_session(session_factory, transaction.manager)
        dbsession.add(Item(name=name, number=number))


def main(global_config, **settings):
    configure_mappers()
    engine = engine_from_config(settings, prefix="sqlalchemy.")
    session_factory = sessionmaker(engine)
    settings["tm.manager_hook"] = "pyramid_tm.explicit_manager"
    with Configurator(settings=settings) as config:
        config.include("pyramid_tm")
        config.registry["dbsession_factory"] = session_factory
        config.add_request_method(
            lambda request: (
                request.environ.get("app.dbsession") or get_tm_session(session_factory, request.tm)
            ),
            "dbsession",
            reify=True,
        )
        for name, view in {"orders": order, "restock": restock, "items": items}.items():
            config.add_route(name, f"/{name}")
            config.add_view(view, route_name=name)
        return config.make_wsgi_app()
