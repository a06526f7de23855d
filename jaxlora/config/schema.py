"""Every public config key: its default, its unit, what it may be, and what it means.

A `Config` is frozen and has been checked: whoever holds one need not check again. A wrong value raises `InputError`
that names the key, the value, what is allowed and how to set it. The sections mirror the dotted names that a
person writes: `Config.optim.learning_rate` is `--config.optim.learning_rate`.
"""

import dataclasses
import difflib
import re
import typing
from collections.abc import Mapping
from typing import Any

from jaxlora.config import keys
from jaxlora.config.keys import Allowed, Key, Section, section_keys, setting
from jaxlora.core.errors import InputError

METRICS = ("nll", "perplexity", "token_accuracy")
"""What `eval.metrics` may name."""

_SOURCES = Allowed("a hub id or a path, or a tuple of them", keys.filled)
_OPTIONAL_SOURCES = Allowed(
    "a hub id or a path, or a tuple of them, or '' to hold out a part of data.train",
    lambda value: value in ("", ()) or keys.filled(value),
)


def _known_init(value: str) -> bool:
    return re.fullmatch(r"kaiming|pissa(_niter_\d+)?", value) is not None


def _assignments(value: tuple[str, ...]) -> bool:
    return all(re.fullmatch(r"[^=]+=[^=]+", entry) for entry in value)


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section):
    path: str = setting(keys.REQUIRED, "Hugging Face id or local folder of the base", keys.FILLED)
    revision: str = setting("", "branch, tag or commit on the hub; '' is its main branch", keys.TEXT)
    dtype: str = setting("bfloat16", "dtype of the frozen base", keys.one_of("bfloat16", "float32"))
    remat: str = setting(
        "full",
        "what the backward pass computes again: nothing, all but matrix products, whole layers",
        keys.one_of("none", "dots", "full"),
    )


@dataclasses.dataclass(frozen=True)
class LoraConfig(Section):
    rank: int = setting(16, "rank of every adapted matrix", keys.at_least(1))
    alpha: float = setting(32.0, "numerator of the scale on B A, see lora.scaling", keys.POSITIVE)
    dropout: float = setting(0.0, "share of an adapter's inputs that is zeroed in training", keys.BELOW_ONE)
    targets: str | tuple[str, ...] = setting(
        "all-linear",
        "the matrices that get an adapter",
        Allowed("'all-linear', or names such as ('q_proj', 'v_proj')", keys.filled),
    )
    scaling: str = setting(
        "alpha/r", "the scale: alpha / rank, or alpha / sqrt(rank)", keys.one_of("alpha/r", "rslora")
    )
    use_dora: bool = setting(False, "DoRA: a trained magnitude for every output, beside A and B", keys.SWITCH)
    init: str = setting(
        "kaiming",
        "how A and B start: random and 0, or PiSSA's singular vectors, whole or by N rounds of iteration",
        Allowed("'kaiming', 'pissa' or 'pissa_niter_N' (such as 'pissa_niter_16')", _known_init),
    )
    init_from: str = setting("", "PEFT adapter folder to start from; '' starts by lora.init", keys.TEXT)
    rank_pattern: tuple[str, ...] = setting(
        (),
        "other ranks by module, the first match counts: ('q_proj=64', 'mlp.*=8')",
        Allowed("a tuple of 'PATTERN=RANK', such as ('q_proj=64', 'mlp.*=8')", _assignments),
    )
    dropout_pattern: tuple[str, ...] = setting(
        (),
        "likewise other dropouts: ('down_proj=0.1',)",
        Allowed("a tuple of 'PATTERN=DROPOUT', such as ('down_proj=0.1',)", _assignments),
    )


@dataclasses.dataclass(frozen=True)
class DataConfig(Section):
    train: str | tuple[str, ...] = setting(
        keys.REQUIRED, "hub id or path to jsonl, json, csv, parquet; a tuple mixes several", _SOURCES
    )
    eval: str | tuple[str, ...] = setting(
        "", "likewise, to evaluate on; '' holds out a part of data.train", _OPTIONAL_SOURCES
    )
    train_split: str = setting("train", "split of a hub data set to train on", keys.FILLED)
    eval_split: str = setting("", "split of data.eval; '' is its train split", keys.TEXT)
    eval_fraction: float = setting(0.02, "share of data.train held out when data.eval is ''", keys.INSIDE)
    max_length: int = setting(1024, "tokens in a row", keys.at_least(2))
    packing: bool = setting(True, "put several examples, kept apart, into one row", keys.SWITCH)
    shuffle: bool = setting(True, "a new order, drawn from the seed, each epoch", keys.SWITCH)
    train_on: str = setting("assistant", "the tokens that carry loss", keys.one_of("assistant", "all"))


@dataclasses.dataclass(frozen=True)
class OptimConfig(Section):
    learning_rate: float = setting(2e-4, "highest learning rate, reached at the end of warmup", keys.POSITIVE)
    warmup_steps: int = setting(100, "steps of linear rise from 0", keys.at_least(0))
    schedule: str = setting("cosine", "the decay after warmup", keys.one_of("cosine"))
    final_fraction: float = setting(
        0.0, "learning rate at the last step, as a share of the highest", keys.UNIT
    )
    weight_decay: float = setting(
        0.01, "decoupled decay of A and B, times the learning rate", keys.NOT_NEGATIVE
    )
    b1: float = setting(0.9, "Adam's decay of the mean gradient", keys.BELOW_ONE)
    b2: float = setting(0.999, "Adam's decay of the mean squared gradient", keys.BELOW_ONE)
    eps: float = setting(1e-8, "Adam's term under the fraction", keys.POSITIVE)
    clip_norm: float = setting(
        1.0, "largest global norm of a step's gradient; 0 is no clipping", keys.NOT_NEGATIVE
    )
    loraplus_lr_ratio: float = setting(
        1.0, "LoRA+: B's learning rate over A's (DoRA's magnitudes go with B)", keys.POSITIVE
    )
    label_smoothing: float = setting(
        0.0, "probability spread over the whole vocabulary in the objective, never in nll", keys.BELOW_ONE
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig(Section):
    batch_size: int = setting(128, "rows in an optimizer step, over all devices", keys.at_least(1))
    micro_batch_size: int = setting(8, "rows computed at once; divides train.batch_size", keys.at_least(1))
    epochs: float = setting(3.0, "passes over data.train; fractions are allowed", keys.POSITIVE)
    max_steps: int = setting(0, "optimizer steps; 0 follows from train.epochs", keys.at_least(0))


@dataclasses.dataclass(frozen=True)
class EvalConfig(Section):
    every: int = setting(500, "steps between evaluations", keys.at_least(1))
    batch_size: int = setting(8, "rows computed at once", keys.at_least(1))
    max_examples: int = setting(0, "examples to evaluate; 0 is all", keys.at_least(0))
    generate: int = setting(0, "held-out examples to answer", keys.at_least(0))
    max_new_tokens: int = setting(64, "longest answer, in tokens", keys.at_least(1))
    metrics: tuple[str, ...] = setting(
        METRICS,
        "what is computed and logged as eval/NAME",
        Allowed(
            f"a tuple of names among {', '.join(METRICS)}, with 'nll' (best and stop read it)",
            lambda value: "nll" in value and set(value) <= set(METRICS) and len(set(value)) == len(value),
        ),
    )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Section):
    every: int = setting(500, "steps between checkpoints", keys.at_least(1))
    keep: int = setting(2, "newest checkpoints that are kept, besides the best", keys.at_least(1))


@dataclasses.dataclass(frozen=True)
class StopConfig(Section):
    patience: int | None = setting(
        None,
        "evaluations without improvement before the run stops; None is never",
        keys.optional(keys.at_least(1)),
    )
    min_delta: float = setting(
        0.0, "fall of eval/nll, in nats, that counts as improvement", keys.NOT_NEGATIVE
    )
    min_steps: int | None = setting(
        None, "no early stop before this step; None is the end of warmup", keys.optional(keys.at_least(0))
    )


@dataclasses.dataclass(frozen=True)
class GuardConfig(Section):
    on_nonfinite: str = setting(
        "stop",
        "a non-finite loss or gradient ends the run, or its step is skipped",
        keys.one_of("stop", "skip"),
    )
    max_skipped: int = setting(20, "skipped steps after which the run ends all the same", keys.at_least(0))


@dataclasses.dataclass(frozen=True)
class LogConfig(Section):
    every: int = setting(10, "steps between lines of metrics.jsonl", keys.at_least(1))


@dataclasses.dataclass(frozen=True)
class MeshConfig(Section):
    data: int = setting(-1, "devices that split the rows", keys.AXIS)
    fsdp: int = setting(1, "devices that split the rows and the parameters", keys.AXIS)
    tensor: int = setting(1, "devices that split each matrix product", keys.AXIS)


@dataclasses.dataclass(frozen=True)
class JournalConfig(Section):
    baseline: str = setting("", "name of the run that this one is compared with", keys.TEXT)
    hypothesis: str = setting("", "a sentence: what this run is expected to show", keys.TEXT)


@dataclasses.dataclass(frozen=True)
class Config:
    """One run, complete and checked.

    Raises:
        InputError: when keys contradict each other (each key alone was checked by its section).
    """

    model: ModelConfig
    data: DataConfig
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    stop: StopConfig = dataclasses.field(default_factory=StopConfig)
    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    journal: JournalConfig = dataclasses.field(default_factory=JournalConfig)
    seed: int = setting(
        0,
        "of the data order, the adapter's start and dropout",
        Allowed("an integer from 0 to 2147483647", lambda value: 0 <= value < 2**31),
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", KEYS["seed"].check(self.seed))
        train, optim = self.train, self.optim
        if train.batch_size % train.micro_batch_size:
            divisors = [n for n in range(1, train.batch_size + 1) if train.batch_size % n == 0]
            near = sorted(sorted(divisors, key=lambda n: abs(n - train.micro_batch_size))[:2])
            raise InputError(
                f"train.batch_size = {train.batch_size} is not divisible by train.micro_batch_size = "
                f"{train.micro_batch_size}.\nA step is made of whole micro-batches: set train.micro_batch_size to "
                f"{' or '.join(map(str, near))}."
            )
        if train.max_steps and optim.warmup_steps >= train.max_steps:
            raise InputError(
                f"optim.warmup_steps = {optim.warmup_steps}, but the run ends after train.max_steps = "
                f"{train.max_steps}: it would never reach its learning rate.\n"
                f"Set optim.warmup_steps below {train.max_steps}, for example "
                f"--config.optim.warmup_steps={train.max_steps // 10}."
            )
        if train.max_steps and self.stop.min_steps is not None and self.stop.min_steps >= train.max_steps:
            raise InputError(
                f"stop.min_steps = {self.stop.min_steps}, but the run ends after train.max_steps = {train.max_steps}: "
                f"it could never stop early.\nSet stop.min_steps below {train.max_steps}, or stop.patience to None."
            )
        rest = [name for name in ("data", "fsdp", "tensor") if getattr(self.mesh, name) == -1]
        if len(rest) > 1:
            raise InputError(
                f"{' and '.join(f'mesh.{name}' for name in rest)} are -1: only one axis can take all the rest.\n"
                f"Give the others a size, for example --config.mesh.{rest[-1]}=1."
            )

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> "Config":
        """Makes a config from nested mappings; keys that are left out take their defaults.

        Args:
            mapping: `{"model": {"path": ...}, "optim": {"learning_rate": ...}, ..., "seed": 0}`, as `to_dict` returns
                it (and JSON reads it back).
        Returns:
            The checked config.
        Raises:
            InputError: an unknown key (with the nearest real one), a key that is missing and has no default, a wrong
                type, or an impossible value.
        """
        flat: dict[str, Any] = {}
        for name, value in mapping.items():
            if isinstance(value, Mapping):
                flat |= {f"{name}.{key}": child for key, child in value.items()}
            elif name not in SECTIONS:
                flat[str(name)] = value
            else:
                raise InputError(
                    f"{name} = {value!r}: {name} is a group of keys.\n"
                    f"Set one of {', '.join(key for key in KEYS if key.startswith(f'{name}.'))}."
                )
        for path in flat:
            if path not in KEYS:
                raise unknown_key(path)
        for key in KEYS.values():
            if key.required and flat.get(key.path) in (None, "", ()):
                raise InputError(f"{key.path} is not set: {key.meaning}.\n{key.remedy}")
        sections = {
            name: section(
                **{key.name: flat[key.path] for key in section_keys(section, name) if key.path in flat}
            )
            for name, section in SECTIONS.items()
        }
        return cls(**sections, **({"seed": flat["seed"]} if "seed" in flat else {}))


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested dicts that JSON can hold (tuples become lists); `Config.from_dict` is its inverse."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(child) for name, child in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(config))


SECTIONS: dict[str, type] = {
    name: kind for name, kind in typing.get_type_hints(Config).items() if issubclass(kind, Section)
}
"""Section name -> its class."""

KEYS: dict[str, Key] = {
    key.path: key
    for name, section in (*SECTIONS.items(), ("", Config))
    for key in section_keys(section, name)
}
"""Dotted name -> the key, for every public key."""


def nearest_key(path: str) -> str | None:
    """The real key that an unknown one most likely means: the same last word, else the most similar spelling."""
    section, _, last = path.rpartition(".")
    same = [key for key in KEYS if key.rpartition(".")[2] == last]
    if same:
        return max(
            same, key=lambda key: difflib.SequenceMatcher(None, section, key.rpartition(".")[0]).ratio()
        )
    by_word: dict[str, str] = {key.rpartition(".")[2]: key for key in KEYS}
    for candidates in (KEYS, by_word):
        found = difflib.get_close_matches(path if candidates is KEYS else last, candidates, n=1)
        if found:
            return found[0] if candidates is KEYS else by_word[found[0]]
    return None


def unknown_key(path: str) -> InputError:
    """The error for a key that does not exist."""
    near = nearest_key(path)
    section = path.partition(".")[0]
    known = (
        [key for key in KEYS if key.startswith(f"{section}.")] if section in SECTIONS else [*SECTIONS, "seed"]
    )
    hint = f"did you mean {near}?" if near else f"known here: {', '.join(known)}."
    return InputError(
        f"unknown config key {path}: {hint}\nAll keys are listed by python -m jaxlora.train --help."
    )
