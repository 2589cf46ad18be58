"""Hand-made features of the digits of scikit-learn (8 x 8 pixels, whole numbers from 0 to 16): fixed formulas, nothing learned.

pixels   [64]  the pixels, row by row, over 16.
profiles [16]  the mean pixel of each row, then of each column, over 16.
strokes  [20]  for each quadrant of 4 x 4 pixels (top left, top right, bottom left, bottom right) a histogram of gradient directions,
               after Dalal and Triggs 2005. With gx = right - left neighbour and gy = lower - upper neighbour, 0 outside the image, and
               a direction and its opposite being the same, bin b = 0..3 sums |gx| + |gy| over the quadrant's pixels whose gradient
               points between b * 45 degrees and (b + 1) * 45, over 64; the fifth bin counts those without a gradient, over 16.

Every sum is one of whole numbers and every divisor a power of two, so the features are the same bits on every machine.

Letters: N samples, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

__all__ = ["DIGITS", "pixels", "profiles", "strokes"]

SIDE, QUADRANT, BINS = 8, 4, 5


def pixels(image_NHW: np.ndarray) -> np.ndarray:
    """float64 [N, 64]."""
    return image_NHW.reshape(len(image_NHW), SIDE * SIDE) / 16.0


def profiles(image_NHW: np.ndarray) -> np.ndarray:
    """float64 [N, 16]."""
    return np.concatenate([image_NHW.sum(2), image_NHW.sum(1)], 1) / (16.0 * SIDE)


def strokes(image_NHW: np.ndarray) -> np.ndarray:
    """float64 [N, 20]."""
    edge_NHW = np.pad(image_NHW.astype(np.int64), ((0, 0), (1, 1), (1, 1)))
    right_NHW = edge_NHW[:, 1:-1, 2:] - edge_NHW[:, 1:-1, :-2]
    down_NHW = edge_NHW[:, 2:, 1:-1] - edge_NHW[:, :-2, 1:-1]
    size_NHW = abs(right_NHW) + abs(down_NHW)
    bin_NHW = _direction(right_NHW, down_NHW)
    histogram = [np.where(bin_NHW == b, size_NHW, 0) / 64.0 for b in range(BINS - 1)]
    histogram.append((size_NHW == 0) / 16.0)
    each_NHWB = np.stack(histogram, -1)
    parts = SIDE // QUADRANT
    quadrant_NABB = each_NHWB.reshape(-1, parts, QUADRANT, parts, QUADRANT, BINS).sum((2, 4))
    return np.asarray(quadrant_NABB.reshape(-1, parts * parts * BINS))


def _direction(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """floor(angle / 45 degrees) of vectors of whole numbers, 0 to 3 after opposite ones are made one. No arctan2: it rounds."""
    turned = (y < 0) | ((y == 0) & (x < 0))
    x, y = np.where(turned, -x, x), np.where(turned, -y, y)
    upper = x <= 0
    x, y = np.where(upper, y, x), np.where(upper, -x, y)
    return np.asarray(2 * upper + (y >= x))


DIGITS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"pixels": pixels, "profiles": profiles, "strokes": strokes}
"""Each stream of sklearn:digits, from its images [N, 8, 8]."""
