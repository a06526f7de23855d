"""The one table of dimension letters, and the array aliases built on it.

Every shape comment, einsum and docstring uses these letters and no others.
"""

from collections.abc import Mapping
from typing import Any

DIMENSIONS = {
    "A": "adapters trained side by side",
    "B": "batch rows",
    "C": "tokens in a chunk of the loss",
    "D": "model width (hidden size)",
    "F": "feed-forward width (intermediate size)",
    "G": "query heads a key/value head serves (H / K)",
    "H": "query heads",
    "K": "key/value heads",
    "L": "layers",
    "M": "micro-batches in a step",
    "N": "tokens (B * T)",
    "O": "outputs of a projection",
    "R": "LoRA rank",
    "S": "keys attended to (T, or the cache's length)",
    "T": "time (positions in a row)",
    "V": "vocabulary",
    "W": "recent steps that a step is compared with",
    "h": "head dimension",
}

Tree = Mapping[str, Any]
"""A nested mapping from names to arrays."""
