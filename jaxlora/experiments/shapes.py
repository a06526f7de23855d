"""The shape of a noisy curve: its fall, its noise, what sticks out of it."""

import bisect

import numpy as np
from scipy.ndimage import rank_filter
from scipy.optimize import isotonic_regression

_CONSISTENT = 1.4826  # times the median absolute deviation is the standard deviation of a normal distribution


def trailing_median(values: np.ndarray, window: int) -> np.ndarray:
    """[S] median of up to `window` values before each (itself not among them); its own value at the first.

    Of a full window it is the upper of the two middle values.
    """
    found = values.copy()
    before: list[float] = []
    for i, value in enumerate(values[:window].tolist()):
        if before:
            found[i] = (before[(i - 1) // 2] + before[i // 2]) / 2
        bisect.insort(before, value)
    if len(values) > window:
        # The filter's output at i is over i - window // 2 ... i - window // 2 + window - 1.
        middle = rank_filter(values, window // 2, size=window, mode="nearest")
        found[window:] = middle[window // 2 : len(values) - window + window // 2]
    return found


def deviations(
    values: np.ndarray, window: int, caution: float, floor: float, share: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """By how many robust deviations each value is above the trailing median.

        deviations(x) = (x - median) / (max(1.4826 * median |x_i - median_i|, floor) * (1 + caution / n))

    over the n <= window values before, each |x_i - median_i| from its own trailing median. (The guard takes them all
    from the newest one; on a level curve both are the same, on a steep one this is the narrower.)

    Args:
        values: [S].
        floor, share: least deviation: in units of the values, and as a share of |median|.
    Returns:
        ([S] deviations, [S] medians).
    """
    median = trailing_median(values, window)
    spread = trailing_median(np.abs(values - median), window)
    n = np.minimum(np.arange(len(values)), window)
    scale = np.maximum(_CONSISTENT * spread, np.maximum(floor, share * np.abs(median))) * (
        1 + caution / np.maximum(n, 1)
    )
    return np.where(n > 0, (values - median) / scale, 0.0), median


def falling(values: np.ndarray) -> np.ndarray:
    """[S] the nearest curve that never rises (least squares): the fall of a loss without its noise.

    It has no width to choose, unlike a mean over neighbours.

    Source: Barlow et al. 1972 (isotonic regression by pooling adjacent violators).
    """
    return isotonic_regression(values, increasing=False).x


def noise(values: np.ndarray) -> float:
    """Robust standard deviation of the noise on a smooth curve, from its second differences (which a line has none of).

    sqrt(6) is the deviation of x_(i-1) - 2 x_i + x_(i+1) for independent x of deviation 1.
    """
    if len(values) < 3:
        return 0.0
    second = values[2:] - 2 * values[1:-1] + values[:-2]
    return float(_CONSISTENT * np.median(np.abs(second)) / np.sqrt(6))


def rank_correlation(values: np.ndarray) -> float:
    """Spearman's rank correlation of values with their order; 0 for fewer than three."""
    if len(values) < 3:
        return 0.0
    ranks = np.argsort(np.argsort(values)).astype(np.float64)
    return float(np.corrcoef(ranks, np.arange(len(values)))[0, 1])
