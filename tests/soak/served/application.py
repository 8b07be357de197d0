"""What the servers import, in the ways in which their documentation names an application."""

from tests.soak.bank import application

__all__ = ["application"]
