"""Two runs side by side: what differs, how their curves went, and which held-out examples got better or worse."""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from jaxlora.experiments.baseline import same_eval_data
from jaxlora.experiments.eval_rules import Evaluations
from jaxlora.experiments.log import Entry, compare, journal
from jaxlora.experiments.records import Run
from jaxlora.experiments.telling import curves_of, extreme, latest, plain

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
    """

    old_step: int
    new_step: int
    all: tuple[Example, ...]

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
    first, second = Evaluations(old), Evaluations(new)
    if not same_eval_data(old, new) or not len(first) or not len(second):
        return None
    before, after = first.best_examples, second.best_examples
    if any(part is None or not {"example", "nll", "tokens"} <= part.keys() for part in (before, after)):
        return None
    assert before is not None
    assert after is not None
    texts = _texts(new) or _texts(old)
    known = dict(zip(before["example"], before["nll"], strict=True))
    found = []
    for number, nll, tokens in zip(after["example"], after["nll"], after["tokens"], strict=True):
        was = known.get(number)
        if isinstance(was, int | float) and isinstance(nll, int | float) and math.isfinite(was - nll):
            found.append(Example(number, *texts.get(number, ("", "")), was, nll, tokens))
    found.sort(key=lambda example: example.change)
    return Examples(first.best_step, second.best_step, tuple(found))


def entries(old: Run, new: Run) -> list[Entry]:
    """The journal's entries of two runs, where the first is the second one's baseline, whatever its own would be."""
    alone = journal([old])
    return [dataclasses.replace(alone[0], baseline=None), compare(new, old)]


def settings(old: Run, new: Run) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of every setting that differs, or that only one of them is known to have."""
    keys = dict.fromkeys((*old.config, *new.config))
    found = [
        (key, old.config.get(key), new.config.get(key)) for key in keys if not key.startswith("journal.")
    ]
    return [line for line in found if line[1] != line[2]]


def outcomes(old: Run, new: Run) -> list[tuple[str, str, str]]:
    """(what, of the old, of the new): how each of two runs went and ended, in words; what neither knows is left out."""

    def told(run: Run) -> dict[str, str]:
        best = extreme(run.eval, "eval/nll")
        numbers = {
            "lowest eval nll": best[1] if best else None,
            "last eval nll": latest(run.eval, "eval/nll"),
            "last train nll": latest(run.train, "train/nll"),
        }
        return {
            "status": run.status.replace("_", " "),
            "steps": f"{run.steps:,}",
            **{name: "" if value is None else f"{value:.4f}" for name, value in numbers.items()},
            "at step": f"{best[0]:,}" if best else "",
            "seconds": plain(run.record.get("seconds")),
            "devices": plain(run.record.get("devices")),
        }

    before, after = told(old), told(new)
    order = ("status", "steps", "lowest eval nll", "at step", *before)
    return [(name, before[name], after[name]) for name in dict.fromkeys(order) if before[name] or after[name]]


def curve(old: Run, new: Run, name: str, most: int = 12) -> list[tuple[int, float | None, float | None]]:
    """(step, old value, new value) of a metric at steps at which both logged it; at all, where there are none.

    Args:
        name: "eval/nll", for example.
        most: lines; of more, evenly chosen ones and the last.
    """
    curves = [
        dict(zip(*(part.tolist() for part in curves_of(run, name).of(name)), strict=True))
        for run in (old, new)
    ]
    steps = sorted(curves[0].keys() & curves[1].keys()) or sorted(curves[0].keys() | curves[1].keys())
    if len(steps) > most:
        steps = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, most).round().astype(int))]
    return [(step, curves[0].get(step), curves[1].get(step)) for step in steps]


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
