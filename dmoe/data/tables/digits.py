"""Features of `sklearn:digits`: fixed formulas of an image of a digit.

The streams of `sklearn:digits` (8 x 8 pixels, integers from 0 to 16) are fixed features; nothing is
learned:

- pixels   [64]  the pixels, row by row, over 16.
- profiles [16]  the mean pixel of each row, then of each column, over 16.
- strokes  [20]  per quadrant of 4 x 4 pixels (top left, top right, bottom left, bottom right) a
  histogram of gradient directions (after Dalal and Triggs 2005). With gx = right - left neighbour
  and gy = lower - upper neighbour (0 outside the image), and opposite directions being equal, bin
  b = 0..3 sums |gx| + |gy| over the pixels whose gradient direction is between b * 45 and
  (b + 1) * 45 degrees, over 64; the fifth bin counts the pixels without a gradient, over 16.

Every sum is one of integers and every divisor a power of two, so the features have the same bits on
every machine.

Letters: N images, H height and W width of an image, B bins of a histogram, Q quadrants per side.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

SIDE, QUADRANT, BINS = 8, 4, 5
"""Pixels per side of an image and of a quadrant; bins per histogram."""


def pixels(image_NHW: np.ndarray) -> np.ndarray:
    """Return the pixels of images [N, 8, 8]: float64 [N, 64]."""
    return image_NHW.reshape(len(image_NHW), SIDE * SIDE) / 16.0


def profiles(image_NHW: np.ndarray) -> np.ndarray:
    """Return the mean pixel of each row and column: float64 [N, 16]."""
    return np.concatenate([image_NHW.sum(2), image_NHW.sum(1)], 1) / (16.0 * SIDE)


def strokes(image_NHW: np.ndarray) -> np.ndarray:
    """Return histograms of gradient directions by quadrant: float64 [N, 20]."""
    padded_NHW = np.pad(image_NHW.astype(np.int64), ((0, 0), (1, 1), (1, 1)))
    gx_NHW = padded_NHW[:, 1:-1, 2:] - padded_NHW[:, 1:-1, :-2]
    gy_NHW = padded_NHW[:, 2:, 1:-1] - padded_NHW[:, :-2, 1:-1]
    magnitude_NHW = abs(gx_NHW) + abs(gy_NHW)
    bin_NHW = _direction(gx_NHW, gy_NHW)
    histogram = [np.where(bin_NHW == b, magnitude_NHW, 0) / 64.0 for b in range(BINS - 1)]
    histogram.append((magnitude_NHW == 0) / 16.0)
    histogram_NHWB = np.stack(histogram, -1)
    parts = SIDE // QUADRANT
    sum_NQQB = histogram_NHWB.reshape(-1, parts, QUADRANT, parts, QUADRANT, BINS).sum((2, 4))
    return np.asarray(sum_NQQB.reshape(-1, parts * parts * BINS))


def _direction(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return floor(angle / 45 degrees) of integer vectors, 0 to 3; opposite vectors are equal.

    Without arctan2, which rounds.
    """
    opposite = (y < 0) | ((y == 0) & (x < 0))
    x, y = np.where(opposite, -x, x), np.where(opposite, -y, y)
    upper = x <= 0
    x, y = np.where(upper, y, x), np.where(upper, -x, y)
    return np.asarray(2 * upper + (y >= x))


DIGIT_FEATURES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "pixels": pixels,
    "profiles": profiles,
    "strokes": strokes,
}
"""Streams of sklearn:digits by name: functions of its images [N, 8, 8]."""
