"""One line of advice on a run, from a stated source: a paper, a page of docs/, or the log itself.

The rules are tried in the order of `RULES`; the first that applies is told. What a run took over from its baseline
(a long warmup, say) is advised about once, on the run that brought it in.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from jaxlora.experiments.baseline import model_of
from jaxlora.experiments.changes import Change, listed, matters, number, scale, shown
from jaxlora.experiments.findings import Finding, nats
from jaxlora.experiments.thresholds import COARSE, GAP, LONG_WARMUP, SLOWER, SMALL_DECAY
from jaxlora.experiments.verdict import Reading, smoothed_apart

Tried = Mapping[str, "Rates"]
"""A run's path -> the learning rates that were tried with its other settings."""


@dataclass(frozen=True)
class Rates:
    """The learning rates tried with otherwise the same settings.

    Attributes:
        rates: ascending, each once. best: that of the lowest eval nll. winner: path of the run that reached it.
    """

    rates: tuple[float, ...]
    best: float
    winner: str


@dataclass(frozen=True)
class Case:
    """What there is to advise on.

    Attributes:
        new, old: the run and its baseline. changes: what differs. verdict: kind -> the first finding of that kind.
        rates: the learning rates tried beside it, None where they are not known.
    """

    new: Reading
    old: Reading | None
    changes: tuple[Change, ...]
    verdict: Mapping[str, Finding]
    rates: Rates | None

    def changed(self, *keys: str) -> bool:
        """Whether one of the keys differs from the baseline's."""
        return any(change.key in keys for change in self.changes)

    @property
    def learning_rate(self) -> float | None:
        return self.new.run.number("optim.learning_rate")


def advise(case: Case) -> str:
    """One line, with its source in brackets; "" where no rule applies."""
    for rule, source in RULES:
        if told := rule(case):
            return f"{told} [{source}]"
    return ""


def tried(readings: Iterable[Reading]) -> dict[str, Rates]:
    """For each run the learning rates of those that differ from it in nothing but `_BESIDE`."""
    beside: dict[tuple, list[tuple[float, float, str]]] = {}
    keys: dict[str, tuple] = {}
    for reading in readings:
        rate = reading.run.number("optim.learning_rate")
        if rate is None or not len(reading.evals) or not model_of(reading.run):
            continue
        config = reading.run.config
        key = tuple(
            sorted((k, repr(v)) for k, v in config.items() if matters(k) and not k.startswith(_BESIDE))
        )
        path = str(reading.run.path)
        beside.setdefault(key, []).append((rate, reading.evals.best, path))
        keys[path] = key
    found = {}
    for key, runs in beside.items():
        best = min(runs, key=lambda one: one[1])
        found[key] = Rates(tuple(sorted({rate for rate, _, _ in runs})), best[0], best[2])
    return {path: found[key] for path, key in keys.items()}


_BESIDE = (
    *("optim.learning_rate", "optim.warmup_steps", "train.epochs", "train.max_steps", "seed"),
    *("eval.", "checkpoint.", "stop.", "guard.", "data.shuffle"),
)


# ---- the rules -----------------------------------------------------------------------------------------------------


def _unstable(case: Case) -> str:
    rate, found = case.learning_rate, case.verdict
    kind = next((kind for kind in ("divergence", "spike", "risk") if kind in found), None)
    if not kind or not rate:
        return ""
    return f"try a learning rate of {number(rate / 2)}, or a longer warmup"


def _stopped_in_warmup(case: Case) -> str:
    found = case.verdict.get("early_stop")
    if not found or not found.numbers["inside_warmup"]:
        return ""
    warmup = case.new.run.number("optim.warmup_steps") or 0
    return f"let no run stop before its learning rate has been reached: stop.min_steps = {number(2 * warmup)}"


def _stopped_too_early(case: Case) -> str:
    found = case.verdict.get("early_stop")
    if not found or not found.numbers["too_early"]:
        return ""
    patience = case.new.run.number("stop.patience")
    more = f" of {number(2 * patience)} instead of {number(patience)}" if patience else ""
    return f"a larger stop.patience{more}: improvements were still coming"


def _smoothed(case: Case) -> str:
    if not case.old or not smoothed_apart(case.new.run, case.old.run):
        return ""
    return "compare nll, not the smoothed loss: smoothing adds a floor that no model gets below"


def _scale_changed_with_rank(case: Case) -> str:
    if not case.old or not case.changed("lora.rank") or not case.changed("alpha/r"):
        return ""
    before, rank = scale(case.old.run.config), case.new.run.number("lora.rank")
    if not before or not rank:
        return ""
    root = case.new.run.config.get("lora.scaling") == "rslora"
    alpha = before * (rank**0.5 if root else rank)
    return f"rank and alpha/r changed together, so neither can be told: lora.alpha = {number(alpha)} keeps the scale"


def _rank_without_effect(case: Case) -> str:
    found = case.verdict.get("eval")
    if not case.old or not case.changed("lora.rank") or not found or found.numbers.get("significant"):
        return ""
    if any(change.key.startswith(("optim.", "data.", "model.")) for change in case.changes):
        return ""
    ranks = [reading.run.number("lora.rank") or 0 for reading in (case.old, case.new)]
    return f"rank {number(max(ranks))} is no better than {number(min(ranks))}: keep {number(min(ranks))}"


def _confounded(case: Case) -> str:
    found, speed = case.verdict.get("eval"), case.verdict.get("convergence")
    factor = speed.numbers.get("factor", np.inf) if speed else 1.0
    effect = (found and found.numbers.get("significant")) or not 1 / SLOWER <= factor <= SLOWER
    keys = [change for change in case.changes if change.key.startswith(_MOVES)]
    if not effect or len(keys) < 2 or not case.changed("lora.rank", "alpha/r"):
        return ""
    names = listed(change.name for change in keys)
    return f"{names} changed together: to tell which of them made the difference, change one at a time"


_MOVES = ("lora.", "alpha/r", "optim.learning_rate", "train.batch_size", "data.train")
"""Keys each of which may move a curve by itself."""


def _decay_too_small(case: Case) -> str:
    decay = case.new.run.number("optim.weight_decay")
    if not decay or not case.changed("optim.weight_decay"):
        return ""
    budget = _decayed(case.new)
    if budget is None or budget >= SMALL_DECAY:
        return ""
    enough = np.log(1 - 3 * SMALL_DECAY) / np.log(1 - budget) * decay
    return (
        f"weight decay {number(decay)} shrinks A and B by {budget:.1%} over the run, too little to matter; "
        f"{enough:.2g} would take {3 * SMALL_DECAY:.0%}"
    )


def _decayed(reading: Reading) -> float | None:
    """The share by which weight decay shrinks a parameter: 1 - exp(-decay * sum of the steps' learning rates).

    The rates between those that were logged are taken to lie on straight lines; None where none were.
    """
    decay = reading.run.number("optim.weight_decay")
    steps, rates = reading.run.train.of("train/learning_rate")
    if decay is None or len(steps) < 2:
        return None
    total = float(np.trapezoid(rates, steps) + rates[0] * steps[0])
    return 1 - float(np.exp(-decay * total))


def _long_warmup(case: Case) -> str:
    warmup, planned = case.new.run.number("optim.warmup_steps"), case.new.run.planned_steps
    if case.old and not case.changed("optim.warmup_steps", "train.epochs", "train.max_steps"):
        return ""
    if not warmup or not planned or warmup <= LONG_WARMUP * planned:
        return ""
    return (
        f"warmup takes {warmup:,.0f} of {planned:,} steps ({warmup / planned:.0%}); "
        f"{0.05 * planned:,.0f} would leave more of them at the full rate"
    )


def _overfits(case: Case) -> str:
    found = case.verdict.get("overfitting")
    if not found:
        return ""
    since, every = found.numbers["since"], case.new.evals.spacing
    finer = ""
    if every > COARSE * case.new.run.steps:
        finer = f"; evaluations nearer together than {every:,.0f} steps would find the best more closely"
    return f"fewer epochs are enough: best/ is of step {since:,.0f}{finer}"


def _undertrained(case: Case) -> str:
    if "undertrained" not in case.verdict:
        return ""
    epochs, rate = case.new.run.number("train.epochs"), case.learning_rate
    longer = (
        f"{number(2 * epochs)} epochs"
        if epochs and not case.new.run.config.get("train.max_steps")
        else "more steps"
    )
    higher = case.rates and rate and case.rates.rates[-1] > rate  # then it is known what more of it does
    return f"train longer ({longer})" + (
        f" or at a learning rate of {number(2 * rate)}" if rate and not higher else ""
    )


def _worse(case: Case) -> str:
    found = case.verdict.get("eval")
    if not case.old or not found or not found.numbers.get("significant") or found.numbers["difference"] < 0:
        return ""
    moved = [
        change
        for change in case.changes
        if change.key.startswith(("lora.", "alpha/r", "optim.", "train.batch_size"))
    ]
    shrunk = _decayed(case.new)
    if shrunk is not None and shrunk < SMALL_DECAY:  # too little to be what made it worse
        moved = [change for change in moved if change.key != "optim.weight_decay"]
    if not moved:
        return ""
    back = listed(f"{change.name} {shown(change.old)}" for change in moved)
    return f"go back to {back}: {case.old.run.name} is better"


def _edge(case: Case) -> str:
    rates = case.rates
    if not rates or len(rates.rates) < 3 or rates.winner != str(case.new.run.path):
        return ""
    tried = f"of the {len(rates.rates)} learning rates tried ({number(rates.rates[0])} to {number(rates.rates[-1])})"
    if rates.best == rates.rates[-1]:
        return f"the best {tried} is the highest: try {number(2 * rates.best)}"
    if rates.best == rates.rates[0]:
        return f"the best {tried} is the lowest: try {number(rates.best / 2)}"
    return ""


def _gap(case: Case) -> str:
    level = case.verdict.get("level")
    if not level or not {"train", "eval"} <= level.numbers.keys():
        return ""
    train, held_out = level.numbers["train"], level.numbers["eval"]
    if held_out - train <= GAP * held_out or held_out < 0.1:
        return ""
    return (
        f"train nll {nats(train)} against eval nll {nats(held_out)}: more training does not close this "
        "gap; more or other data may"
    )


def _no_effect(case: Case) -> str:
    found, told = case.verdict.get("eval"), case.changes
    if not found or not told or found.numbers.get("significant") or not found.numbers.get("paired"):
        return ""
    return f"{told[0].text}: no effect on eval nll; leave it as in {case.old.run.name}" if case.old else ""


Rule = Callable[[Case], str]

RULES: tuple[tuple[Rule, str], ...] = (
    (_stopped_in_warmup, "docs/stopping.md"),
    (_unstable, "Wortsman et al. 2023"),
    (_stopped_too_early, "docs/stopping.md"),
    (_smoothed, "Szegedy et al. 2016, section 7"),
    (_scale_changed_with_rank, "Kalajdzievski 2023"),
    (_rank_without_effect, "Hu et al. 2021, section 7.2"),
    (_confounded, "Montgomery 2017, chapter 7"),
    (_undertrained, "this log"),
    (_worse, "this log"),
    (_decay_too_small, "Loshchilov and Hutter 2019"),
    (_overfits, "Prechelt 1998"),
    (_edge, "Goodfellow et al. 2016, section 11.4.3"),
    (_long_warmup, "Goyal et al. 2017, section 2.2"),
    (_gap, "Goodfellow et al. 2016, section 5.2"),
    (_no_effect, "this log"),
)
"""(rule, source), the first that applies is told."""
