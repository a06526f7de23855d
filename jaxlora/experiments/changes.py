"""What differs between two runs' configs, in a person's words."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from jaxlora.experiments.records import Run
from jaxlora.experiments.thresholds import SAME_SCALE

IGNORED = ("journal.", "mesh.", "log.")
"""What says nothing about the result: why a run was made, where it was computed, and how often it spoke."""

_SWITCHES = {
    "data.shuffle": ("shuffled data", "data not shuffled"),
    "data.packing": ("packed rows", "rows not packed"),
    "lora.use_dora": ("DoRA", "no DoRA"),
    "eval.adaptive": ("adaptive evaluations", "no adaptive evaluations"),
}

_WORDS = {
    "model.path": "model {}",
    "model.revision": "revision {} of the model",
    "model.quantize": "kernels in {}",
    "model.quantize_embeddings": "embeddings in {}",
    "data.train": "trained on {}",
    "data.eval": "evaluated on {}",
    "data.train_split": "split {} to train on",
    "data.max_length": "rows of {} tokens",
    "data.train_on": "loss on {} tokens",
    "optim.learning_rate": "learning rate {}",
    "optim.warmup_steps": "{} warmup steps",
    "optim.label_smoothing": "label smoothing {}",
    "optim.clip_norm": "gradient clipped at {}",
    "optim.b1": "Adam's b1 {}",
    "optim.b2": "Adam's b2 {}",
    "optim.eps": "Adam's eps {}",
    "train.batch_size": "batch {}",
    "train.epochs": "{} epochs",
    "train.max_steps": "at most {} steps",
    "lora.targets": "adapters on {}",
    "lora.init": "adapter started by {}",
    "lora.init_from": "adapter started from {}",
    "eval.every": "an evaluation every {} steps",
    "eval.max_examples": "{} eval examples",
    "checkpoint.every": "a save every {} steps",
    "stop.patience": "patience of {} evaluations",
    "stop.min_steps": "no early stop before step {}",
}
"""Key -> phrase, in the order in which differences are told. Others go by their names."""

_ORDER = [
    *(
        "model.",
        "data.train",
        "lora.rank",
        "lora.alpha",
        "lora.",
        "optim.learning_rate",
        "optim.warmup_steps",
    ),
    *("train.batch_size", "optim.weight_decay", "optim.label_smoothing", "optim.", "train.epochs"),
    *("train.max_steps", "data.", "train.", "seed", "stop.", "eval.", "checkpoint.", "guard."),
]

_UNSET = {
    "train.max_steps": 0,
    "eval.max_examples": 0,
    "stop.patience": None,
    "stop.min_steps": None,
    "lora.init_from": "",
    "model.revision": "",
    "model.quantize": "none",
    "model.quantize_embeddings": "none",
}
"""Values that mean: not set."""


@dataclass(frozen=True)
class Change:
    """One difference. `text` is in words: "learning rate 1e-4 instead of 2e-4"."""

    key: str
    old: Any
    new: Any
    text: str

    @property
    def name(self) -> str:
        """The key in words: "learning rate"."""
        return self.key.rpartition(".")[2].replace("_", " ")


def number(value: float) -> str:
    """A number as a person writes it: 1e-4, 0.05, 2200, 3."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return str(int(value))
    if abs(value) < 0.01:
        mantissa, exponent = f"{value:.5e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.6g}"


def matters(key: str) -> bool:
    """Whether a key may change what comes of a run."""
    return not key.startswith(IGNORED)


def differing(old: Run, new: Run) -> list[Change]:
    """What differs in keys that both runs are known to have, the weightiest first.

    A scale alpha / r that differs is told as well, and an alpha that only follows the rank is not.
    """
    shared = [key for key in new.config if key in old.config and matters(key)]
    keys = [key for key in shared if not same(old.config[key], new.config[key])]
    before, after = scale(old.config), scale(new.config)
    steady = before and after and abs(before - after) <= SAME_SCALE * before
    if steady and "lora.alpha" in keys and "lora.rank" in keys:
        keys.remove("lora.alpha")
    told = [Change(key, old.config[key], new.config[key], _told(key, old, new)) for key in keys]
    if before and after and not steady:
        name = "alpha/sqrt(r)" if new.config.get("lora.scaling") == "rslora" else "alpha/r"
        text = f"{name} {number(after)} instead of {number(before)}"
        told.append(Change("alpha/r", before, after, text))
    return sorted(told, key=lambda change: _place(change.key))


def same(one: Any, other: Any) -> bool:
    """Equality of config values: 1 is 1.0, but True is not 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def scale(config: Mapping[str, Any]) -> float | None:
    """The factor on B A: alpha / r, or alpha / sqrt(r); None where it is not known."""
    rank, alpha = config.get("lora.rank"), config.get("lora.alpha")
    if not isinstance(rank, int | float) or not isinstance(alpha, int | float) or rank <= 0:
        return None
    return alpha / (rank**0.5 if config.get("lora.scaling") == "rslora" else rank)


def listed(texts: Iterable[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    all_but, last = (items := list(texts))[:-1], items[-1:]
    return f"{', '.join(all_but)} and {last[0]}" if all_but else "".join(last)


def _place(key: str) -> tuple[int, str]:
    key = "lora.alpha" if key == "alpha/r" else key
    matching = [(len(start), -place) for place, start in enumerate(_ORDER) if key.startswith(start)]
    return (-max(matching)[1] if matching else len(_ORDER), key)


def _told(key: str, old: Run, new: Run) -> str:
    before, after = old.config[key], new.config[key]
    if key in _SWITCHES and isinstance(after, bool):
        return _SWITCHES[key][not after]
    words = _WORDS.get(key) or f"{key.rpartition('.')[2].replace('_', ' ')} {{}}"
    if key in _UNSET and after == _UNSET[key]:
        return f"no longer {words.format(shown(before))}"
    if key in _UNSET and before == _UNSET[key]:
        return words.format(shown(after))
    return f"{words.format(shown(after))} instead of {shown(before)}"


def shown(value: Any) -> str:
    """A config value in words."""
    if isinstance(value, tuple):
        return "(" + ", ".join(shown(item) for item in value) + ")"
    if isinstance(value, str):
        return PurePath(value).name if value.startswith("/") else value or "nothing"
    if value is None:
        return "none"
    return number(value)
