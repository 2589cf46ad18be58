"""Columns of a table, standardized: mean 0 and deviation 1 in the training samples.

Letters: N samples, W columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dmoe.config.errors import ConfigError


def standardized(
    train_NW: np.ndarray, held_NW: np.ndarray, columns: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Return (x - mean) / deviation of both splits, with both from the training samples.

    A column with one value in all training samples becomes 0 there. Its computed deviation need not
    be 0 (1000 times 0.1 has one of 1e-17, and would become 1), so the values are compared.

    Args:
        train_NW: float64, finite, at least one sample.
        held_NW: float64, finite.
        columns: names, for the error.

    Returns:
        float32 [N, W] of the training and of the held-out samples.

    Raises:
        ConfigError: on data.columns: a column whose numbers are too large or too close together for
            their deviation to be computed in float64, or the result in float32.
    """
    low_W = train_NW.min(0)
    is_constant_W = low_W == train_NW.max(0)
    with np.errstate(over="ignore", invalid="ignore"):
        mean_W = np.where(is_constant_W, low_W, train_NW.mean(0))
        deviation_W = np.where(is_constant_W, 1.0, train_NW.std(0))
        is_wrong_W = ~np.isfinite(mean_W) | ~np.isfinite(deviation_W) | (deviation_W == 0)
        deviation_W[is_wrong_W] = 1.0
        train, held_out = (
            ((value_NW - mean_W) / deviation_W).astype(np.float32)
            for value_NW in (train_NW, held_NW)
        )
    for value_NW in (train, held_out):
        is_wrong_W |= ~np.isfinite(value_NW).all(0)
    if is_wrong_W.any():
        wrong = int(np.flatnonzero(is_wrong_W)[0])
        largest = max(float(np.abs(part_NW[:, wrong]).max()) for part_NW in (train_NW, held_NW))
        raise ConfigError(
            "data.columns",
            columns[wrong],
            f"cannot be standardized: its largest number is {largest:g}, and the deviation in "
            "training is too large or too small for floating-point numbers",
            "write it in another unit, or leave it out",
        )
    return train, held_out
