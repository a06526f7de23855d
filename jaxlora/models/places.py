"""Where tokens stand in a row, and which of them see each other."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Int

MASKED = -1e30
"""Score of a forbidden key: finite, so that a row of padding, which may see nothing, stays free of NaN."""


class Places(NamedTuple):
    """Where the tokens of a batch stand.

    Attributes:
        positions: of each token within its own example, from 0.
        segments: example number within the row, from 1; 0 for padding.
    """

    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]


def visible(
    q_positions: Int[Array, "B T"],
    q_segments: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    k_segments: Int[Array, "B S"],
    window: int | None,
) -> Bool[Array, "B T S"]:
    """Which keys each query may see: same example, not later, not further back than the window.

    Positions restart at each example, so comparing them inside a segment is the causal mask; segment 0 is padding.

    Args:
        q_positions, k_positions: position of each token within its own example.
        q_segments, k_segments: example number within the row from 1; 0 for padding.
        window: sliding window in tokens (a query sees itself and the `window - 1` before it), or None.
    """
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    same = (q_segments[:, :, None] == k_segments[:, None, :]) & (k_segments[:, None, :] > 0)
    allowed = same & (distance >= 0)
    return allowed if window is None else allowed & (distance < window)
