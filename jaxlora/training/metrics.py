"""Metrics: what an evaluation reports, and the one file to add a metric to.

A metric of tokens is a function of an evaluation's `Totals`, one of answers a function of what was `Answered`. Add one
here with its decorator: `eval.metrics` may then ask for it by its name, and `checkpoint.best_by` and `stop.by` know
whether less or more of it is better. Libraries that take time to import are imported inside the function.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Totals(NamedTuple):
    """Sums over all trained tokens of an evaluation, in float64.

    Attributes:
        nll: negative log-likelihood in nats. correct: tokens whose likeliest prediction was right.
        weight: trained tokens.
    """

    nll: float
    correct: float
    weight: float


class Answered(NamedTuple):
    """An evaluation's answers, column by column.

    Attributes:
        reference: the assistant's turns in the data. text: the answers.
        tokens: their lengths. ended: whether each ended by itself, and not at eval.max_new_tokens.
        pattern: `eval.answer_pattern`, "" for none.
    """

    reference: tuple[str, ...]
    text: tuple[str, ...]
    tokens: tuple[int, ...]
    ended: tuple[bool, ...]
    pattern: str


@dataclasses.dataclass(frozen=True)
class Metric:
    """A function of `Totals` or `Answered`; None where it says nothing of these.

    Attributes:
        function: computes it.
        best: `min` or `max`: which of several values is the best.
    """

    function: Callable[[Any], Any]
    best: Callable[..., Any]

    def __call__(self, found: Any) -> Any:
        return self.function(found)


METRICS: dict[str, Metric] = {}
"""Metrics of tokens, by the name that `eval.metrics` uses; logged as eval/NAME."""

ANSWER_METRICS: dict[str, Metric] = {}
"""Likewise metrics of answers: computed where `eval.generate` asks for some."""


def of_tokens(best: Callable[..., Any]) -> Callable[[Callable[[Totals], float]], Callable[[Totals], float]]:
    """Adds a function of `Totals` to `METRICS`, under its own name."""

    def add(function: Callable[[Totals], float]) -> Callable[[Totals], float]:
        METRICS[function.__name__] = Metric(function, best)
        return function

    return add


def of_answers(
    best: Callable[..., Any],
) -> Callable[[Callable[[Answered], float | None]], Callable[[Answered], float | None]]:
    """Adds a function of `Answered` to `ANSWER_METRICS`, under its own name."""

    def add(function: Callable[[Answered], float | None]) -> Callable[[Answered], float | None]:
        ANSWER_METRICS[function.__name__] = Metric(function, best)
        return function

    return add


def better(name: str, mode: str = "auto") -> Callable[[float, float], bool]:
    """(new, old) -> whether the new value of a metric is better than the old one; a NaN never is.

    Args:
        name: of the metric, or a logged name that ends in it: "eval_by_turn/later/nll".
        mode: "min", "max", or "auto" for the metric's own.
    """
    known = METRICS | ANSWER_METRICS
    best = {"min": min, "max": max}.get(mode) or known[name.rpartition("/")[2]].best
    return (lambda new, old: new < old) if best is min else (lambda new, old: new > old)


# ---- of tokens -----------------------------------------------------------------------------------------------------


@of_tokens(best=min)
def nll(totals: Totals) -> float:
    """Mean negative log-likelihood in nats per trained token, never smoothed."""
    return totals.nll / totals.weight


@of_tokens(best=min)
def perplexity(totals: Totals) -> float:
    """exp(nll); infinite where that overflows."""
    try:
        return math.exp(nll(totals))
    except OverflowError:
        return math.inf


@of_tokens(best=max)
def token_accuracy(totals: Totals) -> float:
    """Share of trained tokens that the model predicts as the likeliest."""
    return totals.correct / totals.weight


# ---- of answers ----------------------------------------------------------------------------------------------------


@of_answers(best=max)
def exact_match(answered: Answered) -> float:
    """Share of answers that equal their reference, white space at their ends aside."""
    pairs = zip(answered.text, answered.reference, strict=True)
    return sum(text.strip() == reference.strip() for text, reference in pairs) / len(answered.text)
