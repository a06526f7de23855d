"""Training is torch's, transformers' and PEFT's: the same losses at every step and the same adapter at the end.

`python -m pytest tests/training/test_torch_parity.py -q -s` prints the largest differences, a line a case.
"""

import functools
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from jaxlora.lora.spec import LoraSpec
from jaxlora.training import state, step
from tests.parity.by_jaxlora import jitted_step, train_by_jaxlora
from tests.parity.by_torch import pairs_by_peft, peft_config, train_by_peft, train_by_trainer
from tests.parity.compared import Differences, compare, minus, norm, products
from tests.parity.given import FAMILIES, make_base, make_batches, make_config

LOSS, ADAPTER = 1e-5, 1e-4
"""The bounds: of every step's loss, relative; of every leaf of the final adapter, in relative norm."""

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:peft")

PIECES = {"train.micro_batch_size": 2}
CASES = {
    "plain": {},
    "label smoothing 0.1": {"optim.label_smoothing": 0.1},
    "weight decay 0.1": {"optim.weight_decay": 0.1},
    "4 micro-batches": PIECES,
    "rsLoRA": {"lora.scaling": "rslora"},
    "rank 1": {"lora.rank": 1},
    "rank 64": {"lora.rank": 64, "lora.alpha": 64.0},
    "q_proj,v_proj": {"lora.targets": ("q_proj", "v_proj")},
    "packed rows": {"data.packing": True},
    "everything": PIECES
    | {
        "optim.label_smoothing": 0.1,
        "optim.weight_decay": 0.1,
        "lora.scaling": "rslora",
        "data.packing": True,
    },
}


VARIANTS = {
    "DoRA": {"lora.use_dora": True},
    "LoRA+": {"optim.loraplus_lr_ratio": 4.0, "optim.learning_rate": 1e-3, "optim.weight_decay": 0.1},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """(family) -> its model folder, made once."""
    return functools.cache(lambda family: make_base(family, tmp_path_factory.mktemp(family) / "base"))


@pytest.fixture(scope="module")
def start(bases, tmp_path_factory):
    """(family, changed settings) -> config of a run that starts from an adapter of its own."""

    def make(family, changed):
        return make_config(bases(family), tmp_path_factory.mktemp("adapter") / "start", **changed)

    return make


@pytest.fixture(scope="module")
def by_torch(start):
    """(family, case) -> config, batches, and what torch made of them: once, since faults are held against it too."""

    @functools.cache
    def run(family, case):
        config = start(family, (CASES | VARIANTS)[case])
        batches = make_batches(config)
        return config, batches, train_by_peft(config, batches)

    return run


@pytest.fixture(scope="module")
def table():
    """Takes a line a comparison, and prints them all at the end."""
    rows: dict[str, Differences] = {}
    yield rows
    columns = list(Differences.__annotations__)
    width = max(map(len, rows), default=0)
    print(f"\n\n{'largest relative difference':{width}}  " + "  ".join(f"{name:>9}" for name in columns))
    for case, found in rows.items():
        print(f"{case:{width}}  " + "  ".join(f"{getattr(found, name):9.1e}" for name in columns))


def equal(found):
    return found.loss < LOSS and max(found.leaf, found.whole) < ADAPTER


def trainings():
    """Every case of every family; by default those that hold the most, the others with the slow tests."""
    for family in FAMILIES:
        for case in CASES:
            quick = case in ("plain", "everything")
            yield pytest.param(family, case, marks=() if quick else pytest.mark.slow)
    yield from (("qwen2", case) for case in VARIANTS)


@pytest.mark.parametrize(("family", "case"), [*trainings()])
def test_twenty_steps_are_those_of_torch(family, case, by_torch, table):
    config, batches, theirs = by_torch(family, case)
    found = table[f"{family}, {case}"] = compare(train_by_jaxlora(config, batches), theirs)
    assert equal(found), found


@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_steps_of_pissa_are_those_of_peft(family, start, bases, table):
    """PEFT takes the starting pair off the base's weights, here it stands beside the adapter: the same function."""
    given = start(family, {"optim.weight_decay": 0.1})
    batches = make_batches(given)
    by_peft = train_by_peft(given, batches, peft_config(given, init_lora_weights="pissa"), read=pairs_by_peft)
    config = make_config(
        bases(family), Path(), **{"optim.weight_decay": 0.1, "lora.init": "pissa", "lora.init_from": ""}
    )
    ours, theirs = products(train_by_jaxlora(config, batches)), products(by_peft)
    # Both began with the same products, to the rounding of two decompositions.
    found = table[f"{family}, PiSSA"] = compare(ours, replace(theirs, start=ours.start))
    assert equal(found), found


@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_steps_are_those_of_the_trainer(family, start, table, tmp_path):
    changed = PIECES | {"optim.label_smoothing": 0.1, "optim.weight_decay": 0.1}
    config = start(family, changed)
    batches = make_batches(config, count=8 * config.train.batch_size)
    theirs = train_by_trainer(config, batches, tmp_path)
    found = table[f"{family}, Trainer"] = compare(train_by_jaxlora(config, batches), theirs)
    assert equal(found), found


def test_the_trainings_clip_and_learn(by_torch):
    """Agreement says something only where everything that is compared is felt."""
    config, _, theirs = by_torch("qwen2", "plain")
    clipped = theirs.curves["grad_norm"] > config.optim.clip_norm
    assert 0 < clipped.sum() < len(clipped)
    assert theirs.curves["nll"][-5:].mean() < theirs.curves["nll"][:5].mean() - 0.1
    moved = minus(theirs.adapter, theirs.start)
    assert min(norm({path: leaf}) / norm({path: theirs.adapter[path]}) for path, leaf in moved.items()) > 0.01


# ---- the bounds are narrow enough to see a fault -----------------------------------------------------------------

NUMBERS = {
    "no decay": {"optim.weight_decay": 0.0},
    "no clipping": {"optim.clip_norm": 0.0},
    "no smoothing": {"optim.label_smoothing": 0.0},
    "a warmup one step shorter": {"optim.warmup_steps": 2},
    "b2 0.99": {"optim.b2": 0.99},
    "eps 1e-6": {"optim.eps": 1e-6},
}


def means_of_micro_batches(batch):
    pieces = batch["weights"].reshape(4, -1)
    sums = pieces.sum(axis=1, keepdims=True)
    pieces = pieces * sums.sum() / (4 * np.maximum(sums, 1.0))
    return batch | {"weights": pieces.reshape(batch["weights"].shape)}


def prompts_trained_too(batch):
    return batch | {"weights": (batch["segments"] > 0).astype(np.float32)}


def examples_of_a_row_see_each_other(batch):
    return batch | {"segments": np.minimum(batch["segments"], 1)}


def decay_of_b_only(s, rate):
    def is_b(adapter):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "b", adapter)

    return optax.chain(
        optax.clip_by_global_norm(s.clip_norm),
        optax.scale_by_adam(s.b1, s.b2, s.eps),
        optax.add_decayed_weights(s.weight_decay, mask=is_b),
        optax.scale(-rate),
    )


def clipping_after_adam(s, rate):
    return optax.chain(
        optax.scale_by_adam(s.b1, s.b2, s.eps),
        optax.clip_by_global_norm(s.clip_norm),
        optax.add_decayed_weights(s.weight_decay),
        optax.scale(-rate),
    )


def test_another_scale_is_seen(by_torch, table, monkeypatch):
    config, batches, theirs = by_torch("qwen2", "everything")
    monkeypatch.setattr(LoraSpec, "_scale", lambda self, rank: self.alpha / rank)
    found = table["fault: alpha / r instead of alpha / sqrt r"] = compare(
        train_by_jaxlora(config, batches), theirs
    )
    assert not equal(found), found


@pytest.mark.parametrize("fault", NUMBERS)
def test_other_numbers_are_seen(fault, by_torch, table):
    config, batches, theirs = by_torch("qwen2", "everything")
    changed = CASES["everything"] | NUMBERS[fault]
    other = make_config(Path(config.model.path), Path(config.lora.init_from), **changed)
    found = table[f"fault: {fault}"] = compare(train_by_jaxlora(other, batches), theirs)
    assert not equal(found), found


@pytest.mark.parametrize(
    "fault", [means_of_micro_batches, prompts_trained_too, examples_of_a_row_see_each_other]
)
def test_other_batches_are_seen(fault, by_torch, table):
    config, batches, theirs = by_torch("qwen2", "everything")
    found = compare(train_by_jaxlora(config, batches, change=fault), theirs)
    table[f"fault: {fault.__name__}"] = found
    assert not equal(found), found


@pytest.mark.parametrize("fault", [decay_of_b_only, clipping_after_adam])
def test_another_optimizer_is_seen(fault, by_torch, table, monkeypatch):
    config, batches, theirs = by_torch("qwen2", "everything")
    monkeypatch.setattr(step, "optimizer", fault)
    monkeypatch.setattr(state, "optimizer", fault)
    found = compare(train_by_jaxlora(config, batches, jitted_step), theirs)
    table[f"fault: {fault.__name__}"] = found
    assert not equal(found), found
