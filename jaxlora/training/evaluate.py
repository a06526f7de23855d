"""Evaluation: every held-out example once, its losses summed by example, metrics from the sums."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlora.data.batches import EvalBatches
from jaxlora.training.metrics import METRICS, Totals


class Found(NamedTuple):
    """All that one evaluation of a run finds.

    Attributes:
        metrics: by the name they are logged under: "eval/nll", "eval_by_turn/later/nll", "train_eval/nll".
        files: columns for the files of eval/, by the first part of their name: "eval" (per example: "example", "nll",
            "tokens"), likewise "train_eval", and "answers".
    """

    metrics: dict[str, float]
    files: dict[str, dict[str, list[Any]]]


class Evaluation(NamedTuple):
    """An evaluation's outcome.

    Attributes:
        metrics: by name, over all trained tokens.
        per_example: columns of equal length: "example", "nll" (mean over its trained tokens), "tokens" (how many).
    """

    metrics: dict[str, float]
    per_example: dict[str, list[Any]]


class Evaluator:
    """Evaluates adapters on one data set, with one compiled program.

    Sums are taken by example on the host, in float64, so the result does not depend on how examples fall into rows
    and batches. Memory is one batch's, whatever the number of examples.

    Args:
        step: compiled `evaluate(lora, base, batch) -> TokenLosses`.
        data: the batches.
        put: places a host batch on the devices.
        metrics: names; those of `METRICS` are computed.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        data: EvalBatches,
        put: Callable[[Mapping[str, np.ndarray]], Any],
        metrics: Sequence[str],
    ):
        self._step, self._data, self._put, self._metrics = (
            step,
            data,
            put,
            [n for n in metrics if n in METRICS],
        )

    def __call__(
        self, lora: Any, base: Any, progress: Callable[[int, int], None] | None = None
    ) -> Evaluation:
        """Evaluates one adapter.

        Args:
            lora: the adapter as the decoder reads it; {} for the bare base.
            base: frozen parameters.
            progress: called with (batches done, batches).
        """
        count = len(self._data.examples)
        nll, correct, weight = np.zeros(count), np.zeros(count), np.zeros(count)
        waiting: list[tuple[Any, np.ndarray, np.ndarray]] = []
        for index in range(self._data.num_batches):
            batch = self._data.batch(index)
            losses = self._step(lora, base, self._put(batch))
            rows = np.arange(len(batch["segments"]))[:, None]
            waiting.append((losses, batch["weights"], self._data.example_ids(index)[rows, batch["segments"]]))
            # One batch stays under way on the device while the one before is summed here.
            if len(waiting) > 1:
                _add(*waiting.pop(0), nll, correct, weight)
            if progress:
                progress(index + 1, self._data.num_batches)
        for item in waiting:
            _add(*item, nll, correct, weight)
        totals = Totals(float(nll.sum()), float(correct.sum()), float(weight.sum()))
        seen = np.flatnonzero(weight)
        return Evaluation(
            {name: METRICS[name](totals) for name in self._metrics},
            {
                "example": seen.tolist(),
                "nll": (nll[seen] / weight[seen]).tolist(),
                "tokens": weight[seen].astype(int).tolist(),
            },
        )


def _add(losses: Any, weights: np.ndarray, owner: np.ndarray, *sums: np.ndarray) -> None:
    """Adds a batch's [B, T] losses, hits and weights to the sums of the examples that own the positions."""
    host, kept = jax.device_get(losses), owner >= 0
    for total, values in zip(sums, (host.nll, host.correct, weights), strict=True):
        total += np.bincount(owner[kept], values[kept].astype(np.float64), minlength=len(total))
