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

from jaxlora.config import contradictions, keys
from jaxlora.config.keys import Allowed, Key, Section, section_keys, setting
from jaxlora.core.errors import InputError
from jaxlora.training.metrics import ANSWER_METRICS, METRICS

_SOURCES = Allowed("a hub id or a path, or a tuple of them", keys.filled)
_OPTIONAL_SOURCES = Allowed(
    "a hub id or a path, or a tuple of them, or '' to hold out a part of data.train",
    lambda value: value in ("", ()) or keys.filled(value),
)
_ASSIGNMENTS = keys.matching(r"[^=]+=[^=]+")
_BITS = keys.one_of("none", "int8", "nf4")


def _compiles(value: str) -> bool:
    try:
        re.compile(value)
    except re.error:
        return False
    return True


def _known_metrics(value: tuple[str, ...]) -> bool:
    return "nll" in value and set(value) <= {*METRICS, *ANSWER_METRICS} and len(set(value)) == len(value)


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section):
    path: str = setting(keys.REQUIRED, "Hugging Face id or local folder of the base", keys.FILLED)
    revision: str = setting("", "branch, tag or commit on the hub; '' is its main branch", keys.TEXT)
    dtype: str = setting("bfloat16", "dtype of the frozen base", keys.one_of("bfloat16", "float32"))
    quantize: str = setting("none", "the base's kernels in 8 or 4 bits instead (docs/quantised.md)", _BITS)
    quantize_embeddings: str = setting("none", "likewise its embedding and its head", _BITS)
    remat: str = setting(
        "full",
        "what the backward pass computes again (docs/attention.md); 'auto' is the fastest that fits",
        keys.one_of("none", "dots", "full", "offload", "auto"),
    )
    scan_layers: bool = setting(
        True, "one program for all layers; False is faster on a GPU, and compiles for longer", keys.SWITCH
    )
    attention: str = setting(
        "auto",
        "how attention is computed; 'auto' goes by platform and length",
        keys.one_of("auto", "plain", "blockwise", "sparse", "splash", "cudnn"),
    )

    @property
    def kept(self) -> str:
        """How the base is kept, for a person: "bfloat16", or "nf4 and bfloat16, embeddings in int8"."""
        kernels = "" if self.quantize == "none" else f"{self.quantize} and "
        tables = "" if self.quantize_embeddings == "none" else f", embeddings in {self.quantize_embeddings}"
        return f"{kernels}{self.dtype}{tables}"


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
        Allowed(
            "'kaiming', 'pissa' or 'pissa_niter_N' (such as 'pissa_niter_16')",
            keys.matching(r"kaiming|pissa(_niter_\d+)?"),
        ),
    )
    init_from: str = setting("", "PEFT adapter folder to start from; '' starts by lora.init", keys.TEXT)
    rank_pattern: tuple[str, ...] = setting(
        (),
        "other ranks by module, the first match counts: ('q_proj=64', 'mlp.*=8')",
        Allowed("a tuple of 'PATTERN=RANK', such as ('q_proj=64', 'mlp.*=8')", _ASSIGNMENTS),
    )
    dropout_pattern: tuple[str, ...] = setting(
        (),
        "likewise other dropouts: ('down_proj=0.1',)",
        Allowed("a tuple of 'PATTERN=DROPOUT', such as ('down_proj=0.1',)", _ASSIGNMENTS),
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
    every_epochs: float = setting(
        0.0, "epochs between evaluations, fractions too; 0 counts steps by eval.every", keys.NOT_NEGATIVE
    )
    adaptive: bool = setting(
        False, "evaluate more often where eval/nll is flat: near its minimum", keys.SWITCH
    )
    finest: int = setting(
        0, "with eval.adaptive: fewest steps between evaluations; 0 is an eighth", keys.at_least(0)
    )
    batch_size: int = setting(8, "rows computed at once", keys.at_least(1))
    max_examples: int = setting(0, "examples to evaluate; 0 is all", keys.at_least(0))
    train_examples: int = setting(
        64, "examples of data.train that are evaluated too, for train_eval/nll", keys.at_least(0)
    )
    generate: int = setting(0, "held-out examples to answer", keys.at_least(0))
    generate_every: int = setting(1, "evaluations between those that answer", keys.at_least(1))
    max_new_tokens: int = setting(64, "longest answer, in tokens", keys.at_least(1))
    answer_pattern: str = setting(
        r"####\s*(\S+)",
        "regular expression of the answer within a text, its first group; '' is none",
        Allowed("a regular expression that Python's re compiles", _compiles),
    )
    metrics: tuple[str, ...] = setting(
        (*METRICS, *ANSWER_METRICS),
        "what is computed and logged as eval/NAME; what scores answers, where some are generated",
        Allowed(
            f"a tuple of names among {', '.join((*METRICS, *ANSWER_METRICS))}, with 'nll' (best and stop read it)",
            _known_metrics,
        ),
    )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Section):
    every: int = setting(500, "steps between checkpoints", keys.at_least(1))
    keep: int = setting(2, "newest checkpoints that are kept, besides the best", keys.at_least(1))
    best: int = setting(1, "best checkpoints that are kept; the best adapter is in best/", keys.at_least(1))
    best_by: str = setting(
        "nll", "what the best is best by: NAME for eval/NAME, or a whole name of metrics.jsonl", keys.FILLED
    )
    best_mode: str = setting(
        "auto", "whether less or more is better; auto knows it", keys.one_of("auto", "min", "max")
    )


@dataclasses.dataclass(frozen=True)
class StopConfig(Section):
    patience: int | None = setting(
        None,
        "evaluations without improvement before the run stops; None is never",
        keys.optional(keys.at_least(1)),
    )
    by: str = setting(
        "nll", "what has to improve: NAME for eval/NAME, or a whole name of metrics.jsonl", keys.FILLED
    )
    min_delta: float = setting(
        0.0, "change that counts as improvement, in stop.min_delta_unit", keys.NOT_NEGATIVE
    )
    min_delta_unit: str = setting(
        "absolute",
        "of stop.min_delta: the metric's own, or standard errors of the paired difference of nll",
        keys.one_of("absolute", "standard_errors"),
    )
    min_steps: int | None = setting(
        None, "no early stop before this step; None is the end of warmup", keys.optional(keys.at_least(0))
    )


@dataclasses.dataclass(frozen=True)
class GuardConfig(Section):
    on_spike: str = setting(
        "log",
        "what a spike of loss or gradient norm does: its rows are logged in any case",
        keys.one_of("log", "skip", "rollback", "stop"),
    )
    on_nonfinite: str = setting(
        "stop",
        "a non-finite loss or gradient (never applied) ends the run, is skipped, or rolls it back",
        keys.one_of("stop", "skip", "rollback"),
    )
    on_divergence: str = setting(
        "stop", "what a loss that stays above where it began does", keys.one_of("log", "stop")
    )
    threshold: float = setting(
        6.0, "robust deviations above the recent median from which a step is a spike", keys.POSITIVE
    )
    window: int = setting(
        32,
        "steps whose losses and gradient norms are recent",
        Allowed("an integer from 4 to 1024", lambda n: 4 <= n <= 1024),
    )
    max_skipped: int = setting(20, "skipped steps after which the run ends all the same", keys.at_least(0))
    max_rollbacks: int = setting(3, "rollbacks after which the next ends the run", keys.at_least(0))
    rollback_factor: float = setting(
        0.5,
        "by which a rollback multiplies the learning rate",
        Allowed("a number above 0, at most 1", lambda value: 0 < value <= 1),
    )


@dataclasses.dataclass(frozen=True)
class LogConfig(Section):
    every: int = setting(10, "steps between lines of metrics.jsonl", keys.at_least(1))


@dataclasses.dataclass(frozen=True)
class MeshConfig(Section):
    data: int = setting(-1, "devices that split the rows", keys.AXIS)
    fsdp: int = setting(1, "devices that split the rows and the parameters", keys.AXIS)
    tensor: int = setting(1, "devices that split each matrix product", keys.AXIS)
    trial: int = setting(1, "in a sweep: devices, or groups of them, that split the trials", keys.AXIS)
    memory_gb: float = setting(
        0.0, "memory of a device that a run may take, in GB (1e9 bytes); 0 asks the device", keys.NOT_NEGATIVE
    )


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
        contradictions.check(self)

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


def defaults() -> dict[str, Any]:
    """What each key is that a config does not set, nested; so it was in folders that are older than the key."""
    nested: dict[str, Any] = {name: {} for name in SECTIONS}
    for key in KEYS.values():
        if not key.required:
            (nested[key.path.rpartition(".")[0]] if "." in key.path else nested)[key.name] = key.default
    return nested


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


def find_key(path: str) -> Key:
    """The key of a dotted name.

    Raises:
        InputError: there is no such key.
    """
    if path not in KEYS:
        raise unknown_key(path)
    return KEYS[path]


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
