"""Retry: run a request or a job again if its transaction lost a race.

It is retried only if the failed attempt committed nothing and sent nothing to the client.
"""

from ._attempt import Retry, is_retryable
from ._call import run_transaction
from ._codes import RETRYABLE_CODES
from ._middleware import RetryMiddleware

__all__ = ["RETRYABLE_CODES", "Retry", "RetryMiddleware", "is_retryable", "run_transaction"]
