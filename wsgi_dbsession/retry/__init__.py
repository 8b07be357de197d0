"""Retry: a request or a job that lost a race runs again.

Only where nothing of the failed attempt was committed, and where the client has not received
anything of it.
"""

from ._attempt import Retry, is_retryable
from ._call import run_transaction
from ._codes import RETRYABLE_CODES
from ._middleware import RetryMiddleware

__all__ = ["RETRYABLE_CODES", "Retry", "RetryMiddleware", "is_retryable", "run_transaction"]
