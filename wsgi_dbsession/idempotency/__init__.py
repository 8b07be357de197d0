"""Idempotency: a request that a client repeats with the same key takes effect once.

The key is stored in the request's own transaction, together with the response.
"""

from ._middleware import Idempotency
from ._table import idempotency_table, purge

__all__ = ["Idempotency", "idempotency_table", "purge"]
