"""Every config key: its default holds, what is not allowed is refused by name, and a config survives JSON."""

import dataclasses
import json
import re
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlora.config.schema import (
    KEYS,
    SECTIONS,
    Config,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    StopConfig,
    TrainConfig,
    nearest_key,
    to_dict,
)
from jaxlora.core.errors import InputError

# The public keys of the design, each with a value that is allowed and not the default (None where there is no other),
# and some that are not allowed.
CASES = {
    "model.path": ("folder", ["", " ", 3]),
    "model.revision": ("v1", [1]),
    "model.dtype": ("float32", ["float16", "", None]),
    "model.quantize": ("nf4", ["int4", "", None]),
    "model.quantize_embeddings": ("int8", ["fp4", "", None]),
    "model.remat": ("auto", ["some", True]),
    "model.attention": ("splash", ["flash", True]),
    "model.scan_layers": (False, [0, "no", None]),
    "lora.rank": (1, [0, -1, 2.0, "8", True]),
    "lora.alpha": (1, [0, -1.0, "16", True, float("nan"), float("inf")]),
    "lora.dropout": (0.5, [1.0, -0.1]),
    "lora.targets": (("q_proj", "v_proj"), ["", (), ("q_proj", 3), ("",), 7]),
    "lora.scaling": ("rslora", ["alpha"]),
    "lora.use_dora": (True, [1, "yes", None]),
    "lora.init": ("pissa_niter_16", ["pissa_niter", "pissa_niter_x", "svd", "", None]),
    "lora.init_from": ("folder", [None]),
    "lora.rank_pattern": (("q_proj=64", "mlp.*=8"), [("q_proj",), ("=4",), ("q_proj=",), "q_proj=4"]),
    "lora.dropout_pattern": (("down_proj=0.1",), [("down_proj",), ("a=b=c",), 0.1]),
    "data.train": (("a.jsonl", "b.jsonl"), ["", (), ("a", ""), 3]),
    "data.eval": ("b.jsonl", [3, ("a", " ")]),
    "data.train_split": ("train[:10]", [""]),
    "data.eval_split": ("test", [0]),
    "data.eval_fraction": (0.5, [0.0, 1.0, -0.1]),
    "data.max_length": (2, [1, 0, 8.5]),
    "data.packing": (False, [0, "no"]),
    "data.shuffle": (False, [1]),
    "data.train_on": ("all", ["user"]),
    "optim.learning_rate": (1, [0.0, -1e-4, "1e-4", float("nan")]),
    "optim.warmup_steps": (0, [-1, 0.5]),
    "optim.schedule": (None, ["linear", "Cosine"]),
    "optim.final_fraction": (1.0, [-0.1, 1.1]),
    "optim.weight_decay": (0, [-0.1]),
    "optim.b1": (0, [1.0, -0.1]),
    "optim.b2": (0.99, [1.0]),
    "optim.eps": (1e-6, [0.0]),
    "optim.clip_norm": (0, [-1.0, float("inf")]),
    "optim.loraplus_lr_ratio": (16.0, [0, -1.0, "16"]),
    "optim.label_smoothing": (0.1, [1.0, -0.1]),
    "train.batch_size": (16, [0, 128.0]),
    "train.micro_batch_size": (4, [0]),
    "train.epochs": (1, [0.0, -1]),
    "train.max_steps": (200, [-1]),
    "eval.every": (1, [0]),
    "eval.every_epochs": (0.25, [-0.1]),
    "eval.adaptive": (True, [1]),
    "eval.finest": (None, [-1, 0.5]),
    "eval.batch_size": (1, [0]),
    "eval.max_examples": (1, [-1]),
    "eval.train_examples": (0, [-1]),
    "eval.generate": (1, [-1]),
    "eval.generate_every": (3, [0]),
    "eval.answer_pattern": ("= (.*)", ["(", "[a", None]),
    "eval.max_new_tokens": (1, [0]),
    "eval.metrics": (("nll",), [(), ("perplexity",), ("nll", "wer"), ("nll", "nll"), "nll"]),
    "checkpoint.every": (1, [0]),
    "checkpoint.keep": (1, [0]),
    "checkpoint.best": (3, [0]),
    "checkpoint.best_by": ("eval/perplexity", ["", 1]),
    "checkpoint.best_mode": ("max", ["lowest"]),
    "stop.patience": (1, [0, -1, 1.5, False]),
    "stop.by": ("perplexity", ["", None]),
    "stop.min_delta": (0.1, [-0.1]),
    "stop.min_delta_unit": ("standard_errors", ["percent"]),
    "stop.min_steps": (0, [-1]),
    "guard.on_spike": ("skip", ["ignore"]),
    "guard.on_nonfinite": ("skip", ["ignore", "log"]),
    "guard.on_divergence": ("log", ["skip"]),
    "guard.threshold": (8, [0, -1.0]),
    "guard.window": (64, [3, 2000]),
    "guard.max_skipped": (0, [-1]),
    "guard.max_rollbacks": (0, [-1]),
    "guard.rollback_factor": (1, [0, 1.5]),
    "log.every": (1, [0]),
    "mesh.data": (8, [0, -2]),
    "mesh.fsdp": (8, [0]),
    "mesh.tensor": (8, [0]),
    "mesh.trial": (4, [0]),
    "mesh.memory_gb": (16, [-1]),
    "journal.baseline": ("Nov22_10-57", [1]),
    "journal.hypothesis": ("A larger rank helps.", [None]),
    "seed": (2**31 - 1, [-1, 2**31, 0.0]),
}


def nested(**changes):
    """The smallest config as nested dicts, with changes by dotted key."""
    plain = {"model": {"path": "m"}, "data": {"train": "d.jsonl"}}
    for path, value in changes.items():
        section, _, name = path.rpartition(".")
        (plain.setdefault(section, {}) if section else plain)[name] = value
    return plain


def value_of(config, path):
    for name in path.split("."):
        config = getattr(config, name)
    return config


def test_the_cases_cover_every_key():
    assert set(CASES) == set(KEYS)


def test_defaults_are_those_of_the_schema():
    config = Config.from_dict(nested())
    assert config == Config(ModelConfig("m"), DataConfig("d.jsonl"))
    for path, key in KEYS.items():
        if not key.required:
            assert value_of(config, path) == key.default, path


@pytest.mark.parametrize("path", [path for path, (value, _) in CASES.items() if value is not None])
def test_an_allowed_value_is_taken_in_the_keys_own_type(path):
    value = CASES[path][0]
    taken = value_of(Config.from_dict(nested(**{path: value})), path)
    assert taken == value
    assert taken != KEYS[path].default
    assert type(taken) is (float if KEYS[path].kind is float else type(value))


@pytest.mark.parametrize(
    ("path", "value"), [(path, bad) for path, (_, all_bad) in CASES.items() for bad in all_bad]
)
def test_a_value_that_is_not_allowed_is_refused_by_name(path, value):
    with pytest.raises(InputError) as caught:
        Config.from_dict(nested(**{path: value}))
    said = str(caught.value)
    assert path in said
    assert f"--config.{path}=" in said
    assert KEYS[path].required or repr(value) in said
    assert KEYS[path].required or KEYS[path].allowed.words in said
    assert said.count("\n") <= 1


@pytest.mark.parametrize("path", [path for path, key in KEYS.items() if key.required])
def test_a_required_key_that_is_missing_is_asked_for(path):
    section, name = path.split(".")
    plain = nested()
    del plain[section][name]
    with pytest.raises(InputError, match=f"^{re.escape(path)} is not set"):
        Config.from_dict(plain)


@pytest.mark.parametrize("path", KEYS)
def test_the_remedy_sets_a_value_that_is_allowed(path):
    """What an error tells a person to type has to work, in a shell."""
    key = KEYS[path]
    (typed,) = shlex.split(key.remedy.partition("or with ")[2].removesuffix("."))
    text = re.fullmatch(r"--config\.([^=]+)=(.*)", typed)
    assert text
    assert text[1] == path
    assert text[2] == "VALUE" or key.check(key.parse(text[2])) == key.default


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("optim.learning_rat", "optim.learning_rate"),
        ("optim.lr_warmup_steps", "optim.warmup_steps"),
        ("train.learning_rate", "optim.learning_rate"),
        ("learning_rate", "optim.learning_rate"),
        ("lora.r", "lora.rank"),
        ("batch_size", "train.batch_size"),
        ("evl.batch_size", "eval.batch_size"),
        ("lora.target", "lora.targets"),
        ("sed", "seed"),
        ("modl.path", "model.path"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(path, nearest):
    assert nearest_key(path) == nearest
    with pytest.raises(InputError, match=f"unknown config key {re.escape(path)}: did you mean {nearest}\\?"):
        Config.from_dict(nested(**{path: 1}))


def test_an_unknown_key_like_no_other_is_answered_with_the_ones_there_are():
    with pytest.raises(
        InputError, match=r"unknown config key lora\.xyzzy: known here: lora\.rank, lora\.alpha"
    ):
        Config.from_dict(nested(**{"lora.xyzzy": 1}))
    with pytest.raises(InputError, match=r"known here: model, .*seed"):
        Config.from_dict(nested(xyzzy={"quux": 1}))


def test_a_group_is_no_key():
    with pytest.raises(InputError, match=r"lora = 8: lora is a group of keys\.\nSet one of lora\.rank"):
        Config.from_dict(nested(lora=8))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train.batch_size": 12}, r"train\.batch_size = 12 .*micro_batch_size = 8.*\n.*4 or 6"),
        ({"train.micro_batch_size": 256}, r"train\.batch_size = 128 .*micro_batch_size = 256.*\n.*64 or 128"),
        (
            {"train.max_steps": 100},
            r"optim\.warmup_steps = 100.*train\.max_steps = 100.*\n.*warmup_steps=10\.",
        ),
        (
            {"train.max_steps": 200, "stop.min_steps": 200},
            r"stop\.min_steps = 200.*train\.max_steps = 200.*\n.*below 200",
        ),
        ({"eval.finest": 2}, r"eval\.finest = 2 goes with eval\.adaptive"),
        ({"eval.adaptive": True, "eval.finest": 501}, r"eval\.finest = 501.*eval\.every = 500"),
        ({"checkpoint.best_by": "exact_match"}, r"checkpoint\.best_by = 'exact_match'.*none are generated"),
        ({"checkpoint.best_by": "nil"}, r"checkpoint\.best_by = 'nil' is not computed.*nll, perplexity"),
        ({"stop.by": "perplexity", "eval.metrics": ("nll",)}, r"stop\.by = 'perplexity' is not computed"),
        (
            {"stop.by": "perplexity", "stop.min_delta_unit": "standard_errors"},
            r"stop\.min_delta_unit = 'standard_errors'.*stop\.by = 'perplexity'",
        ),
        (
            {"guard.on_spike": "stop", "guard.on_nonfinite": "skip"},
            r"guard\.on_spike = 'stop' but guard\.on_nonfinite = 'skip'",
        ),
        ({"guard.on_spike": "rollback", "guard.max_rollbacks": 0}, r"guard\.max_rollbacks = 0 contradict"),
        ({"guard.on_nonfinite": "skip", "guard.max_skipped": 0}, r"guard\.max_skipped = 0 contradict"),
        ({"mesh.fsdp": -1}, r"mesh\.data and mesh\.fsdp are -1.*\n.*--config\.mesh\.fsdp=1"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(changes, said):
    with pytest.raises(InputError, match=said):
        Config.from_dict(nested(**changes))


def test_keys_that_only_seem_to_contradict_are_taken():
    Config.from_dict(nested(**{"train.max_steps": 1, "optim.warmup_steps": 0}))
    Config.from_dict(nested(**{"mesh.data": 1, "mesh.fsdp": -1}))
    Config.from_dict(nested(**{"eval.adaptive": True, "eval.finest": 500}))
    Config.from_dict(nested(**{"eval.generate": 8, "checkpoint.best_by": "eval/exact_match"}))
    Config.from_dict(nested(**{"stop.by": "eval_by_turn/later/nll"}))
    Config.from_dict(nested(**{"guard.on_spike": "skip", "guard.on_nonfinite": "rollback"}))
    Config.from_dict(nested(**{"train.batch_size": 7, "train.micro_batch_size": 7}))


def test_a_section_made_in_code_is_checked_too():
    assert isinstance(LoraConfig(alpha=1).alpha, float)
    with pytest.raises(InputError, match=r"lora\.rank"):
        LoraConfig(rank=0)
    with pytest.raises(InputError, match=r"train\.epochs"):
        dataclasses.replace(TrainConfig(), epochs=0)


def test_a_config_cannot_be_changed():
    config = Config.from_dict(nested())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.optim.learning_rate = 1.0  # pyright: ignore
    assert hash(config) == hash(Config.from_dict(nested()))


@given(
    rate=st.floats(1e-8, 10, exclude_min=True),
    epochs=st.integers(1, 9),
    patience=st.none() | st.integers(1, 99),
    targets=st.just("all-linear") | st.lists(st.sampled_from(["q_proj", "o_proj"]), min_size=1).map(tuple),
    hypothesis=st.text(),
    seed=st.integers(0, 2**31 - 1),
)
def test_a_config_survives_json(rate, epochs, patience, targets, hypothesis, seed):
    config = Config(
        model=ModelConfig("m"),
        data=DataConfig(("a", "b")),
        lora=LoraConfig(targets=targets),
        optim=OptimConfig(learning_rate=rate),
        train=TrainConfig(epochs=epochs),
        stop=StopConfig(patience=patience),
        seed=seed,
    )
    plain = to_dict(config)
    plain["journal"]["hypothesis"] = hypothesis
    again = json.loads(json.dumps(plain))
    assert again == plain
    assert to_dict(Config.from_dict(again)) == plain


def test_every_key_is_explained_in_one_line():
    assert set(SECTIONS) == {path.partition(".")[0] for path in KEYS} - {"seed"}
    for path, key in KEYS.items():
        assert 10 < len(key.meaning) <= 100, path
        assert "\n" not in key.meaning + key.allowed.words, path
