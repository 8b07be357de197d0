"""Accounts, and the transfers between them."""

from database import Base
from sqlalchemy import Column, Integer, String


class Account(Base):
    __tablename__ = "account"
    name = Column(String, primary_key=True)
    balance = Column(Integer, nullable=False, default=0)


class Transfer(Base):
    __tablename__ = "transfer"
    id = Column(Integer, primary_key=True)
    what = Column(String, nullable=False)
