"""Idempotency: a request that a client repeats with the same key takes effect once.

The middleware stores the key and the response in the request's own transaction.
"""

from ._middleware import Idempotency
from ._table import idempotency_table, purge

__all__ = ["Idempotency", "idempotency_table", "purge"]
