"""Two runs side by side: what differs, how their curves went, and which held-out examples got better or worse."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxlora.experiments import paired
from jaxlora.experiments.log import Entry, journal
from jaxlora.experiments.records import Run
from jaxlora.experiments.telling import extreme

SHOWN = 5
"""Examples shown of those that got better, and of those that got worse."""


class Example(NamedTuple):
    """One held-out example under two adapters.

    Attributes:
        example: its number. prompt, reference: beginnings of its texts, "" where no run has kept them.
        old, new: mean nll over its trained tokens, in nats.
        tokens: how many of those it has.
    """

    example: int
    prompt: str
    reference: str
    old: float
    new: float
    tokens: int

    @property
    def change(self) -> float:
        """New less old."""
        return self.new - self.old


@dataclasses.dataclass(frozen=True)
class Examples:
    """What became of each held-out example, each run at its best evaluation that has them.

    Attributes:
        old_step, new_step: those evaluations.
        all: the examples that both have, the most improved first.
        difference: of the whole, None where there are too few.
    """

    old_step: int
    new_step: int
    all: tuple[Example, ...]
    difference: paired.Difference | None

    @property
    def better(self) -> tuple[Example, ...]:
        """Those with a lower nll than before, the most improved first."""
        return tuple(example for example in self.all if example.change < 0)

    @property
    def worse(self) -> tuple[Example, ...]:
        """Those with a higher one, the worst first."""
        return tuple(example for example in reversed(self.all) if example.change > 0)


def examples(old: Run, new: Run) -> Examples | None:
    """The held-out examples of two runs, one by one.

    Returns:
        None where the runs were not evaluated on the same data, or one has no losses by example.
    """
    if eval_data(old) is None or eval_data(old) != eval_data(new):
        return None
    first, second = _best_evaluation(old), _best_evaluation(new)
    if first is None or second is None:
        return None
    (old_step, before), (new_step, after) = first, second
    texts = _texts(new) or _texts(old)
    known = dict(zip(before["example"], before["nll"], strict=True))
    found = []
    for number, nll, tokens in zip(after["example"], after["nll"], after["tokens"], strict=True):
        values = known.get(number), nll
        if all(isinstance(value, int | float) and np.isfinite(value) for value in values):
            found.append(Example(number, *texts.get(number, ("", "")), *values, tokens))
    found.sort(key=lambda example: example.change)
    return Examples(old_step, new_step, tuple(found), paired.difference(before, after))


def eval_data(run: Run) -> str | None:
    """The fingerprint of the held-out data; None where it is not known."""
    data = run.record.get("data")
    held_out = data.get("eval") if isinstance(data, Mapping) else None
    return held_out.get("fingerprint") if isinstance(held_out, Mapping) else None


def entry(old: Run, new: Run) -> Entry:
    """The journal's entry of a run whose baseline is the given one, whatever its own would be."""
    named = dataclasses.replace(
        new,
        record={**new.record, "baseline": old.name},
        config={**new.config, "journal.baseline": old.name},
    )
    return next(entry for entry in journal([old, named]) if entry.run is named)


def settings(old: Run, new: Run) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of every setting that differs, or that only one of them is known to have."""
    keys = dict.fromkeys((*old.config, *new.config))
    found = [(key, old.config.get(key), new.config.get(key)) for key in keys if not key.startswith("journal.")]
    return [line for line in found if line[1] != line[2]]


def curve(old: Run, new: Run, name: str, most: int = 12) -> list[tuple[int, float | None, float | None]]:
    """(step, old value, new value) of a metric, at steps that both were evaluated at; of all, where there are none.

    Args:
        name: "eval/nll".
        most: lines; of more, evenly chosen ones and the last.
    """
    curves = [dict(zip(*(part.tolist() for part in run.eval.of(name)), strict=True)) for run in (old, new)]
    steps = sorted(curves[0].keys() & curves[1].keys()) or sorted(curves[0].keys() | curves[1].keys())
    if len(steps) > most:
        steps = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, most).round().astype(int))]
    return [(step, curves[0].get(step), curves[1].get(step)) for step in steps]


def _best_evaluation(run: Run) -> tuple[int, Mapping[str, list[Any]]] | None:
    """The step and the columns of the evaluation with the lowest eval/nll, where its examples were kept."""
    best = extreme(run.eval, "eval/nll")
    columns = run.examples(best[0]) if best else None
    if best is None or columns is None or not {"example", "nll", "tokens"} <= columns.keys():
        return None
    return best[0], columns


def _texts(run: Run) -> dict[int, tuple[str, str]]:
    """Example -> beginnings of its prompt and its reference, as the run kept them."""
    kept = run.examples(0, "examples")
    if kept and {"example", "prompt", "reference"} <= kept.keys():
        return {
            number: (prompt, reference)
            for number, prompt, reference in zip(
                kept["example"], kept["prompt"], kept["reference"], strict=True
            )
        }
    return {}
