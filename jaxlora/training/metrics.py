"""Metrics: what an evaluation reports, and the one file to add a metric to.

A metric of tokens is a function of an evaluation's `Totals`, one of answers a function of what was `Answered`. Add one
here with its decorator: `eval.metrics` may then ask for it by its name, and `checkpoint.best_by` and `stop.by` know
whether less or more of it is better. Libraries that take time to import are imported inside the function.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

BINS = 15
"""Of `ece`: as many equally wide ranges of confidence as Guo et al. 2017 take."""


class Totals(NamedTuple):
    """Sums over all trained tokens of an evaluation, or of a group of them, in float64.

    Attributes:
        nll: negative log-likelihood in nats. correct: tokens whose likeliest prediction was right.
        weight: trained tokens.
        top5: tokens that were among the five likeliest. entropy: of the predicted distributions, in nats.
        confidences: the largest probabilities, and hits: tokens predicted right, by range of the largest probability
            (range m of `BINS` holds those in (m / BINS, (m + 1) / BINS]).
    """

    nll: float
    correct: float
    weight: float
    top5: float = 0.0
    entropy: float = 0.0
    confidences: tuple[float, ...] = ()
    hits: tuple[float, ...] = ()


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


@of_tokens(best=max)
def top5_accuracy(totals: Totals) -> float:
    """Share of trained tokens that are among the model's five likeliest: fewer than five logits are greater."""
    return totals.top5 / totals.weight


@of_tokens(best=min)
def entropy(totals: Totals) -> float:
    """Mean entropy of the predicted distribution, in nats: how undecided the model is, right or wrong."""
    return totals.entropy / totals.weight


@of_tokens(best=min)
def ece(totals: Totals) -> float:
    """Expected calibration error: how far the largest probability is from the share of tokens predicted right.

    ece = sum_m |sum of confidences in range m - tokens predicted right in range m| / tokens

    Source: Guo et al. 2017, equation 3, with 15 ranges.
    """
    ranges = zip(totals.confidences, totals.hits, strict=True)
    return sum(abs(confidence - hits) for confidence, hits in ranges) / totals.weight


# ---- of answers ----------------------------------------------------------------------------------------------------


@of_answers(best=max)
def exact_match(answered: Answered) -> float:
    """Share of answers that equal their reference, white space at their ends aside."""
    return _mean(text.strip() == reference.strip() for text, reference in _pairs(answered))


@of_answers(best=max)
def answer_match(answered: Answered) -> float | None:
    """Share of answers whose value is the reference's: the last match of `eval.answer_pattern`, its first group.

    Values are compared without commas, dollar signs, a full stop at the end and the space around them ("$1,200." is
    "1200"). References without a match are left out; None where none has one.
    """
    if not answered.pattern:
        return None
    pattern = re.compile(answered.pattern)
    found = [(_value(pattern, text), _value(pattern, reference)) for text, reference in _pairs(answered)]
    found = [(text, reference) for text, reference in found if reference is not None]
    return _mean(text == reference for text, reference in found) if found else None


@of_answers(best=max)
def rouge_l(answered: Answered) -> float:
    """Mean F1 of ROUGE-L by the rouge-score package, without a stemmer; its words are runs of a-z and 0-9.

    Source: Lin 2004, section 3; https://github.com/google-research/google-research/tree/master/rouge
    """
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rougeL"])
    return _mean(scorer.score(reference, text)["rougeL"].fmeasure for text, reference in _pairs(answered))


@of_answers(best=max)
def bleu(answered: Answered) -> float:
    """BLEU of all answers as one corpus by sacrebleu, 0 to 100, with its defaults (4-grams, 13a tokens).

    Source: Papineni et al. 2002; Post 2018.
    """
    import sacrebleu

    # `force` only silences a remark about answers that look tokenised.
    return sacrebleu.corpus_bleu(list(answered.text), [list(answered.reference)], force=True).score


@of_answers(best=max)
def chrf(answered: Answered) -> float:
    """chrF of all answers as one corpus by sacrebleu, 0 to 100, with its defaults (6 characters, no words, beta 2).

    Source: Popovic 2015.
    """
    import sacrebleu

    return sacrebleu.corpus_chrf(list(answered.text), [list(answered.reference)]).score


@of_answers(best=min)
def answer_tokens(answered: Answered) -> float:
    """Mean length of the answers in tokens."""
    return _mean(answered.tokens)


@of_answers(best=max)
def ended(answered: Answered) -> float:
    """Share of answers that ended by themselves, within `eval.max_new_tokens`."""
    return _mean(answered.ended)


def _pairs(answered: Answered) -> Iterable[tuple[str, str]]:
    return zip(answered.text, answered.reference, strict=True)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _value(pattern: re.Pattern[str], text: str) -> str | None:
    """The last match's first group (all of it where the pattern has none), as it is compared; None without a match."""
    *_, last = (None, *pattern.finditer(text))
    if last is None:
        return None
    value = (last[1] if pattern.groups else last[0]) or ""
    return value.replace(",", "").replace("$", "").strip().removesuffix(".").strip()
