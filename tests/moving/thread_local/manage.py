"""Interest: run by cron once a year."""

from database import db_session
from models import Account


def add_interest():
    for account in Account.query:
        account.balance += account.balance // 10
    db_session.commit()
    db_session.remove()


if __name__ == "__main__":
    add_interest()
