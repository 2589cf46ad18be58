"""Counter-based random numbers: a value is a function of a key and of where it stands, so nothing has to be stored or replayed.

The mixing step is SplitMix64's finaliser (Steele, Lea and Flood 2014), a bijection of 64-bit words; all arithmetic is modulo
2**64, so the numbers are the same on every machine. Not for cryptography.
"""

from __future__ import annotations

import numpy as np

__all__ = ["counter_hash", "mix64"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_MASK = 2**64 - 1


def mix64(word: np.ndarray) -> np.ndarray:
    """Scramble 64-bit words one to one: uint64 array of any shape (at least one axis) in, the same shape out."""
    word = (word ^ (word >> np.uint64(30))) * _FIRST
    word = (word ^ (word >> np.uint64(27))) * _SECOND
    return np.asarray(word ^ (word >> np.uint64(31)))


def counter_hash(key: int, *counters: np.ndarray | int) -> np.ndarray:
    """A pseudo-random uint64 for each combination of counters, which broadcast against each other.

    `key` is any integer (taken modulo 2**64); a counter is a non-negative integer or an array of them. The order of the
    counters matters. The result has the broadcast shape, at least one axis: numpy warns on overflowing scalars but wraps
    arrays.
    """
    state = mix64(np.array([key & _MASK], dtype=np.uint64))
    for counter in counters:
        state = mix64(state + _GOLDEN * (np.atleast_1d(np.asarray(counter)).astype(np.uint64) + np.uint64(1)))
    return state
