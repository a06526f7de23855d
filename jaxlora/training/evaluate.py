"""Evaluation: every held-out example once, its tokens summed by example and turn, metrics from the sums."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlora.data.batches import EvalBatches, Examples
from jaxlora.parallel import exchange
from jaxlora.parallel.rows import Share
from jaxlora.training.metrics import BINS, METRICS, Totals

TURNS = ("first", "later")
"""Where a trained token stands: in its example's first trained stretch, or in one after it."""


class Found(NamedTuple):
    """All that one evaluation of a run finds.

    Attributes:
        metrics: by the name they are logged under: "eval/nll", "eval_by_turn/later/nll", "train_eval/nll".
        files: columns for the files of eval/, by the first part of their name: "eval" (per example: "example", "nll",
            "tokens"), likewise "train_eval", and "answers".
        texts: Markdown for TensorBoard, by name.
        shown: lines for the terminal.
    """

    metrics: dict[str, float]
    files: dict[str, dict[str, list[Any]]]
    texts: dict[str, str] = {}  # noqa: RUF012  (nobody writes into it)
    shown: tuple[str, ...] = ()


class Evaluation(NamedTuple):
    """An evaluation's outcome.

    Attributes:
        metrics: by the name they are logged under, over all trained tokens and over groups of them.
        per_example: columns of equal length: "example", "nll" (mean over its trained tokens), "tokens" (how many).
    """

    metrics: dict[str, float]
    per_example: dict[str, list[Any]]


class Groups:
    """The groups of trained tokens that metrics are computed over besides all: by turn, and by source.

    Args:
        examples: what is evaluated.
        sources: the source of each example [examples], as an index into `names`; None where all have one.
        names: of the sources.
        turns: whether to look for turns.
    Attributes:
        sources: [examples].
        members: name of a group, as in "eval_by_turn/later" without the "eval" -> [sources, turns], true for what
            belongs to it. Turns are there where any example has a later one, sources where there is more than one.
        everything: likewise of all.
    """

    def __init__(
        self,
        examples: Examples,
        sources: np.ndarray | None = None,
        names: Sequence[str] = ("",),
        turns: bool = True,
    ):
        self.sources = np.zeros(len(examples), np.int64) if sources is None else sources
        self.members: dict[str, np.ndarray] = {}
        shape = (len(names), len(TURNS))
        if turns and _most_stretches(examples) > 1:
            for turn, name in enumerate(TURNS):
                self.members[f"_by_turn/{name}"] = np.broadcast_to(np.arange(len(TURNS)) == turn, shape)
        present = np.unique(self.sources)
        if len(present) > 1:
            for source in present:
                chosen = np.arange(len(names)) == source
                self.members[f"_by_source/{names[source]}"] = np.broadcast_to(chosen[:, None], shape)
        self.everything = np.ones(shape, bool)

    def logged(self, metrics: Sequence[str], name: str = "eval") -> list[str]:
        """All names under which these metrics of tokens are logged."""
        return [f"{name}{group}/{metric}" for group in ("", *self.members) for metric in metrics]


def _most_stretches(examples: Examples) -> int:
    """Trained stretches in the example that has the most."""
    targets = examples.trained.copy()
    targets[examples.offsets[:-1]] = False  # the first id of an example is never predicted
    begins = targets & ~np.append(False, targets[:-1])
    return int(np.add.reduceat(begins, examples.offsets[:-1], dtype=np.int64).max())


class Evaluator:
    """Evaluates adapters on one data set, with one compiled program.

    Sums are taken by example and turn on the host, in float64, so the result does not depend on how examples fall into
    rows and batches. Memory is one batch's and some numbers an example.

    Args:
        step: compiled `evaluate(lora, base, batch) -> TokenMetrics`.
        data: the batches.
        put: places a host batch on the devices.
        metrics: names; those of `METRICS` are computed.
        groups: over which besides all, if any.
        name: what the metrics' names begin with.
        share: the rows that this process makes and sums, where it is one of several; None for all.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        data: EvalBatches,
        put: Callable[[Mapping[str, np.ndarray]], Any],
        metrics: Sequence[str],
        groups: Groups | None = None,
        name: str = "eval",
        share: Share | None = None,
    ):
        self._step, self._data, self._put, self._name = step, data, put, name
        self._share = share
        self._metrics = [n for n in metrics if n in METRICS]
        groups = groups or Groups(data.examples, turns=False)
        self._sources, self._members = groups.sources, {"": groups.everything, **groups.members}

    def __call__(
        self, lora: Any, base: Any, progress: Callable[[int, int], None] | None = None
    ) -> Evaluation:
        """Evaluates one adapter.

        Args:
            lora: the adapter as the decoder reads it; {} for the bare base.
            base: frozen parameters.
            progress: called with (batches done, batches).
        """
        sums = _Sums(self._sources, len(self._members[""]))
        waiting: list[tuple[Any, Mapping[str, np.ndarray], np.ndarray]] = []
        count, share = self._data.batch_size, self._share
        own = np.arange(count) if share is None else share.own(count)
        for index in range(self._data.num_batches):
            batch = self._data.batch(index, own)
            found = self._step(lora, base, self._put(batch))
            if share is not None:  # rows that another process has too are counted there
                batch |= {"weights": batch["weights"] * share.counted(count)}
            waiting.append((found, batch, self._data.example_ids(index)[own[:, None], batch["segments"]]))
            # One batch stays under way on the device while the one before is summed here.
            if len(waiting) > 1:
                sums.add(*self._fetched(*waiting.pop(0)))
            if progress:
                progress(index + 1, self._data.num_batches)
        for item in waiting:
            sums.add(*self._fetched(*item))
        sums.add_others()
        found: dict[str, float] = {}
        for group, members in self._members.items():
            totals = sums.totals(members)
            found |= {f"{self._name}{group}/{name}": METRICS[name](totals) for name in self._metrics}
        return Evaluation(found, sums.per_example())

    def _fetched(self, found: Any, batch: Mapping[str, np.ndarray], owner: np.ndarray) -> tuple[Any, ...]:
        """What `_Sums.add` takes, on the host."""
        host = (
            jax.device_get(found) if self._share is None else self._share.fetch(found, self._data.batch_size)
        )
        return host, batch, owner


class _Sums:
    """Sums over trained tokens, by example and turn; those by range of the confidence, by source and turn.

    Args:
        sources: of the examples [examples], each below `count`.
    """

    FIELDS = ("nll", "correct", "top5", "entropy")

    def __init__(self, sources: np.ndarray, count: int):
        self._sources = sources
        self._sums = {name: np.zeros((len(sources), len(TURNS))) for name in (*self.FIELDS, "weight")}
        self._ranges = {name: np.zeros((count, len(TURNS), BINS)) for name in ("confidence", "correct")}

    def add(self, found: Any, batch: Mapping[str, np.ndarray], owner: np.ndarray) -> None:
        """Adds a batch's [B, T] `TokenMetrics`, on the host, to the sums of the examples that own the positions."""
        kept = batch["weights"] > 0
        example, turn = owner[kept], later_turn(batch["segments"], batch["weights"])[kept]
        values = {
            name: getattr(found, name)[kept].astype(np.float64) for name in (*self.FIELDS, "confidence")
        }
        values["weight"] = batch["weights"][kept].astype(np.float64)
        for name, total in self._sums.items():
            np.add.at(total, (example, turn), values[name])
        # (m / BINS, (m + 1) / BINS] is range m; a confidence that is no number spoils the sum of whichever range.
        number = np.ceil(np.nan_to_num(values["confidence"]) * BINS).astype(np.int64) - 1
        number = np.clip(number, 0, BINS - 1)
        for name, total in self._ranges.items():
            np.add.at(total, (self._sources[example], turn, number), values[name])

    def add_others(self) -> None:
        """Adds what the other processes have summed: their rows are others."""
        for sums in (self._sums, self._ranges):
            for name, own in sums.items():
                sums[name] = exchange.summed(own)

    def totals(self, members: np.ndarray) -> Totals:
        """What the cells of a group [sources, turns] come to."""
        plain = {name: float(total[members[self._sources]].sum()) for name, total in self._sums.items()}
        ranges = {name: tuple(total[members].sum(axis=0).tolist()) for name, total in self._ranges.items()}
        return Totals(**plain, confidences=ranges["confidence"], hits=ranges["correct"])

    def per_example(self) -> dict[str, list[Any]]:
        """The columns of `Evaluation.per_example`."""
        nll, weight = (self._sums[name].sum(axis=1) for name in ("nll", "weight"))
        seen = np.flatnonzero(weight)
        return {
            "example": seen.tolist(),
            "nll": (nll[seen] / weight[seen]).tolist(),
            "tokens": weight[seen].astype(int).tolist(),
        }


def later_turn(segments: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Which positions [B, T] stand after the end of their segment's first trained stretch: 1, or else 0."""
    trained = weights > 0
    begins = np.ones_like(trained)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    before = np.zeros_like(trained)
    before[:, 1:] = trained[:, :-1]
    stretches = np.cumsum(trained & ~(before & ~begins), axis=1)  # begun so far in the row
    started = np.zeros_like(stretches)
    started[:, 1:] = stretches[:, :-1]
    in_earlier_segments = np.maximum.accumulate(np.where(begins, started, 0), axis=1)
    return (stretches - in_earlier_segments > 1).astype(np.int64)
