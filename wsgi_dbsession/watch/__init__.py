"""Find who holds a connection, since when, and at which line: the watch and its board."""

from ._board import Board, allow_loopback
from ._records import Ended, Holder, Place, PoolUse, Waiter
from ._watch import Watch

__all__ = ["Board", "Ended", "Holder", "Place", "PoolUse", "Waiter", "Watch", "allow_loopback"]
