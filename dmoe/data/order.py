"""The training order of sequences, computed without an index list or generator state.

Sample i of step s of a run has the run-wide index n = s * global_batch + i. With M sequences its
epoch is n // M, and it reads sequence permute(n % M, M, seed, n // M). The order is therefore a
function of (seed, s, i) alone: a resumed run, or a run on another number of ranks, reads the same
sequences.

`permute` is a balanced Feistel network (Luby and Rackoff 1988) of 8 rounds on [0, 4**h), the
smallest such domain that holds M: (left, right) -> (right, left xor F_k(right)). A result outside
[0, M) is permuted again until it falls inside ("cycle walking", Black and Rogaway 2002), which
gives a permutation of [0, M). The domain is smaller than 4 * M + 4, so fewer than 4 passes are
needed on average. Cost: O(count) time and memory per batch, independent of M.

`counter_hash` is a counter-based random number generator: each value is a function of a key and of
counters, so no state is stored. Its mixing step is the finalizer of SplitMix64 (Steele, Lea and
Flood 2014), a bijection of 64-bit words. All arithmetic is modulo 2**64, so the values are the same
on every machine. Not for cryptography.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 8


def permute(index_N: np.ndarray, size: int, seed: int, epoch_N: np.ndarray | int) -> np.ndarray:
    """Apply the pseudo-random permutation of range(size) that belongs to (seed, epoch).

    Args:
        index_N: int64 [N], in [0, size).
        size: M, the number of permuted items.
        seed: key of the permutation.
        epoch_N: non-negative; one epoch for all indices, or int64 [N].

    Returns:
        int64 [N], in [0, size).
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
        # The upper bits of the mixed word are the best mixed ones.
        left_N, right_N = right_N, left_N ^ (mix64(right_N ^ key_N) >> np.uint64(64 - half_bits))
    return (left_N << bits) | right_N


def global_sample_indices(step: int, first: int, count: int, global_batch: int) -> np.ndarray:
    """Return the run-wide indices n of some samples of one step.

    Args:
        step: optimizer step, from 0.
        first: index of the first sample in the global batch.
        count: number of consecutive samples.
        global_batch: samples per step, over all ranks.

    Returns:
        int64 [count]: step * global_batch + first .. + count - 1.
    """
    assert min(step, first, count) >= 0, (
        f"step {step}, first {first}, count {count} must not be negative"
    )
    assert first + count <= global_batch, (
        f"samples {first}..{first + count - 1} are not in a batch of {global_batch}"
    )
    return step * global_batch + first + np.arange(count, dtype=np.int64)


def sequence_indices(
    step: int, first: int, count: int, global_batch: int, num_sequences: int, seed: int
) -> np.ndarray:
    """Return the sequences that some samples of one step read, in the shuffled order.

    Args:
        step: optimizer step, from 0.
        first: index of the first sample in the global batch.
        count: number of consecutive samples.
        global_batch: samples per step, over all ranks.
        num_sequences: M, sequences of the dataset.
        seed: of the shuffle.

    Returns:
        int64 [count], in [0, num_sequences).
    """
    index_N = global_sample_indices(step, first, count, global_batch)
    return permute(index_N % num_sequences, num_sequences, seed, index_N // num_sequences)


# The constants of SplitMix64.
_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_MASK = 2**64 - 1


def mix64(word: np.ndarray) -> np.ndarray:
    """Mix 64-bit words bijectively: uint64 array of at least one axis -> the same shape."""
    word = (word ^ (word >> np.uint64(30))) * _MULTIPLIER_1
    word = (word ^ (word >> np.uint64(27))) * _MULTIPLIER_2
    return np.asarray(word ^ (word >> np.uint64(31)))


def counter_hash(key: int, *counters: np.ndarray | int) -> np.ndarray:
    """Return a pseudo-random uint64 per combination of counters, which broadcast.

    `key` is any integer (taken modulo 2**64); a counter is a non-negative integer or an array of
    them. The order of the counters matters. The result has the broadcast shape and at least one
    axis, because numpy warns on overflowing scalars but wraps arrays silently.
    """
    state = mix64(np.array([key & _MASK], dtype=np.uint64))
    for counter in counters:
        # + 1, so that counter 0 changes the state too.
        counter_N = np.atleast_1d(np.asarray(counter)).astype(np.uint64) + np.uint64(1)
        state = mix64(state + _INCREMENT * counter_N)
    return state
