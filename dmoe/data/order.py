"""The order in which sequences are trained on: arithmetic, with no list of indices and no generator to save.

Sample i of step s of a run is number n = s * global_batch + i. With M sequences its epoch is n // M and it reads sequence
permute(n % M, M, seed, n // M). So the order is a function of (seed, s, i) alone: a resumed run and a run on another number
of ranks read the same sequences, whatever was read before and by whom.

Formula: a balanced Feistel network (Luby and Rackoff 1988) of 8 rounds permutes [0, 4**h), the smallest such domain that holds
M: (left, right) -> (right, left xor F_k(right)). A result outside [0, M) is sent through again until it falls inside ("cycle
walking", Black and Rogaway 2002), which is again a permutation of [0, M). The domain is under 4 * M + 4, so fewer than 4
passes on average. Cost: O(count) time and memory for a batch, independent of M.

Counter-based random numbers: a value is a function of a key and of where it stands, so nothing has to be stored or replayed.

The mixing step is SplitMix64's finaliser (Steele, Lea and Flood 2014), a bijection of 64-bit words; all arithmetic is modulo
2**64, so the numbers are the same on every machine. Not for cryptography.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 8


def permute(index_N: np.ndarray, size: int, seed: int, epoch_N: np.ndarray | int) -> np.ndarray:
    """The pseudo-random permutation of range(size) that belongs to (seed, epoch), at each given index.

    index_N: int64 [N] in [0, size); epoch_N: one epoch for all, or int64 [N] one for each, non-negative. Returns int64 [N].
    """
    assert 1 <= size < 2**62, f"cannot permute {size} items"
    assert index_N.size == 0 or (index_N.min() >= 0 and index_N.max() < size), "index out of range"
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    key_RN = np.stack(
        [
            np.broadcast_to(counter_hash(seed, np.asarray(epoch_N), round_), index_N.shape)
            for round_ in range(_ROUNDS)
        ]
    )
    value_N = _feistel(index_N.astype(np.uint64), key_RN, half_bits)
    outside_N = value_N >= size
    while outside_N.any():
        value_N[outside_N] = _feistel(value_N[outside_N], key_RN[:, outside_N], half_bits)
        outside_N = value_N >= size
    return value_N.astype(np.int64)


def _feistel(value_N: np.ndarray, key_RN: np.ndarray, half_bits: int) -> np.ndarray:
    bits = np.uint64(half_bits)
    left_N, right_N = value_N >> bits, value_N & np.uint64((1 << half_bits) - 1)
    for key_N in key_RN:
        # The upper bits of the mixed word are its best ones.
        left_N, right_N = right_N, left_N ^ (mix64(right_N ^ key_N) >> np.uint64(64 - half_bits))
    return (left_N << bits) | right_N


def sample_numbers(step: int, first: int, count: int, global_batch: int) -> np.ndarray:
    """The run-wide numbers n = step * global_batch + i of samples i = first .. first + count - 1 of a step: int64 [count]."""
    assert min(step, first, count) >= 0, (
        f"step {step}, first {first}, count {count} must not be negative"
    )
    assert first + count <= global_batch, (
        f"samples {first}..{first + count - 1} are not in a batch of {global_batch}"
    )
    return step * global_batch + first + np.arange(count, dtype=np.int64)


def sequence_indices(
    step: int, first: int, count: int, global_batch: int, sequences: int, seed: int
) -> np.ndarray:
    """Which of `sequences` stored sequences the samples first .. first + count - 1 of a step read: int64 [count]."""
    number_N = sample_numbers(step, first, count, global_batch)
    return permute(number_N % sequences, sequences, seed, number_N // sequences)


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
        state = mix64(
            state + _GOLDEN * (np.atleast_1d(np.asarray(counter)).astype(np.uint64) + np.uint64(1))
        )
    return state
