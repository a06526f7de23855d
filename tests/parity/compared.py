"""What two trainings left behind, and how far apart that is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlora.core.tree import leaves


@dataclass(frozen=True)
class Trained:
    """What a training left behind.

    Attributes:
        curves: by name [steps]: "objective" (what is minimised, a mean over the step's trained tokens), "nll" (the same
            without smoothing; the Trainer does not tell it) and "grad_norm" (before clipping).
        start, adapter: leaves by path, unscaled, before the first step and after the last.
    """

    curves: dict[str, np.ndarray]
    start: dict[str, np.ndarray]
    adapter: dict[str, np.ndarray]


@dataclass(frozen=True)
class Differences:
    """The largest of each kind, all relative.

    Attributes:
        loss: of any step's objective or nll. grad_norm: of any step's.
        leaf: ||ours - theirs|| / ||theirs|| of any leaf. whole: of all leaves together.
        update: ||ours - theirs|| / ||theirs - start|| of all leaves together: what training did, without the start,
            which makes up most of the norm of a.
    """

    loss: float
    grad_norm: float
    leaf: float
    whole: float
    update: float


def flat(adapter: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Leaves by path, in float64: copies, since the step donates its state."""
    return {"/".join(path): np.array(leaf, np.float64) for path, leaf in leaves(adapter)}


def norm(tree: Mapping[str, np.ndarray]) -> float:
    """Root of the sum of all squares."""
    return float(np.sqrt(sum(np.sum(leaf**2) for leaf in tree.values())))


def minus(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """one - other, leaf by leaf; both have the same."""
    assert one.keys() == other.keys()
    return {path: leaf - other[path] for path, leaf in one.items()}


def products(trained: Trained) -> Trained:
    """The same training with a b in the place of a and b: where they start as singular vectors, signs are arbitrary."""

    def multiplied(tree: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {
            path.removesuffix("/a"): leaf @ tree[path.removesuffix("a") + "b"]
            for path, leaf in tree.items()
            if path.endswith("/a")
        }

    return Trained(trained.curves, multiplied(trained.start), multiplied(trained.adapter))


def compare(ours: Trained, theirs: Trained) -> Differences:
    """The largest differences between two trainings that began with the same adapter."""
    assert norm(minus(ours.start, theirs.start)) == 0.0
    curves = {
        name: float(np.max(np.abs(ours.curves[name] - values) / values))
        for name, values in theirs.curves.items()
    }
    gap = minus(ours.adapter, theirs.adapter)
    return Differences(
        loss=max(worst for name, worst in curves.items() if name != "grad_norm"),
        grad_norm=curves["grad_norm"],
        leaf=max(norm({path: leaf}) / norm({path: theirs.adapter[path]}) for path, leaf in gap.items()),
        whole=norm(gap) / norm(theirs.adapter),
        update=norm(gap) / norm(minus(theirs.adapter, theirs.start)),
    )
