"""Which examples share a row."""

import numpy as np


def pack(lengths: np.ndarray, capacity: int, *, packing: bool = True) -> list[tuple[int, ...]]:
    """Puts every example into exactly one row whose examples' lengths sum to at most `capacity`.

    Best fit, decreasing: from the longest to the shortest, each goes into the fullest row it still fits into. The
    result depends on the lengths alone. Finding that row is one shift of an integer whose bit f is set when some row
    has f positions free, so 50,000 examples take well under a second.

    Args:
        lengths: [n] positions each example takes, 1 .. capacity.
        capacity: positions in a row.
        packing: False puts every example into a row of its own.
    Returns:
        The rows, each the example numbers in rising order; rows ordered by their first example.
    Raises:
        ValueError: a length outside 1 .. capacity.
    Source:
        Johnson, "Near-optimal bin packing algorithms", 1973: at most 11/9 of the optimum and 4 rows more.
    """
    lengths = np.asarray(lengths, np.int64)
    if lengths.size and not (lengths.min() >= 1 and lengths.max() <= capacity):
        raise ValueError(f"lengths lie in {lengths.min()}..{lengths.max()}; a row holds 1..{capacity}")
    if not packing:
        return [(example,) for example in range(len(lengths))]
    rows: list[list[int]] = []
    with_free: list[list[int]] = [
        [] for _ in range(capacity + 1)
    ]  # free positions -> rows that have exactly them
    occupied = 0  # bit f: with_free[f] is not empty
    for example in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[example])
        fitting = occupied >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row = with_free[free].pop()
            if not with_free[free]:
                occupied ^= 1 << free
            rows[row].append(example)
        else:
            free, row = capacity, len(rows)
            rows.append([example])
        with_free[free - length].append(row)
        if free > length:  # a full row is never looked for again
            occupied |= 1 << (free - length)
    return sorted(tuple(sorted(row)) for row in rows)


def most_in_a_row(lengths: np.ndarray, capacity: int, *, packing: bool = True) -> int:
    """The most examples that any row of any of them can have: as many as the shortest that fit together.

    Args:
        lengths, capacity, packing: as for `pack`.
    """
    if not packing:
        return min(len(lengths), 1)
    return int(np.searchsorted(np.cumsum(np.sort(np.asarray(lengths, np.int64))), capacity, side="right"))


def efficiency(lengths: np.ndarray, rows: int, capacity: int) -> float:
    """The share of all positions that hold a token: sum(lengths) / (rows * capacity)."""
    return float(np.sum(lengths)) / (rows * capacity) if rows else 0.0
