"""Trials: which may be one stack, and what a halving keeps of them."""

import dataclasses

import pytest

from jaxlora.config.schema import KEYS, Config
from jaxlora.core.errors import InputError
from jaxlora.sweeps.trials import MAY_DIFFER, Halving, Trial, groups, stack_key


def config(held_out="eval.jsonl", **changes):
    keys = {"model.path": "base", "data.train": "train.jsonl", "data.eval": held_out}
    nested = {}
    for path, value in (keys | {name.replace("__", "."): value for name, value in changes.items()}).items():
        section, _, name = path.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return Config.from_dict(nested)


def trial(name="a", **changes):
    return Trial(name, changes, config(**changes))


def test_what_may_differ_are_keys():
    assert set(KEYS) >= MAY_DIFFER


# What makes another group, key by key: a new key belongs here until a stack is known to take it.
APART = {
    *(key for key in KEYS if key.startswith(("model.", "data.", "mesh."))),
    *(
        "train.batch_size",
        "train.micro_batch_size",
        "lora.targets",
        "lora.use_dora",
        "lora.init",
        "optim.schedule",
    ),
    *("eval.batch_size", "eval.max_examples", "eval.train_examples", "eval.generate", "eval.max_new_tokens"),
    *("eval.answer_pattern", "eval.metrics", "guard.window"),
}


def test_every_key_may_differ_or_makes_a_group():
    assert set(KEYS) - MAY_DIFFER == APART


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim__learning_rate", 1e-3),
        ("optim__warmup_steps", 7),
        ("lora__rank", 4),
        ("lora__rank_pattern", ("q_proj=4",)),
        ("lora__dropout", 0.1),
        ("train__epochs", 5.0),
        ("train__max_steps", 300),
        ("seed", 3),
        ("stop__patience", 2),
        ("guard__on_spike", "stop"),
        ("eval__every", 20),
        ("journal__hypothesis", "It helps."),
    ],
)
def test_what_a_stack_takes_stays_together(key, value):
    assert stack_key(config(**{key: value})) == stack_key(config())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train__batch_size", 64),
        ("train__micro_batch_size", 4),
        ("lora__targets", ("q_proj",)),
        ("lora__use_dora", True),
        ("lora__init", "pissa"),
        ("data__max_length", 64),
        ("data__shuffle", False),
        ("data__train", ("train.jsonl", "more.jsonl")),
        ("model__path", "other"),
        ("eval__generate", 4),
        ("eval__metrics", ("nll",)),
        ("guard__window", 16),
    ],
)
def test_what_it_does_not_take_makes_a_group(key, value):
    assert stack_key(config(**{key: value})) != stack_key(config())


def test_a_seed_that_draws_the_held_out_part_makes_a_group():
    assert stack_key(config(seed=1)) == stack_key(config(seed=2))
    assert stack_key(config("", seed=1)) != stack_key(config("", seed=2))


def test_groups_come_in_the_order_of_their_first_trials():
    a, b, c, d = (
        trial("a"),
        trial("b", train__batch_size=64),
        trial("c", optim__learning_rate=1e-3),
        trial("d", train__batch_size=64, seed=1),
    )
    assert groups([a, b, c, d]) == [(a, c), (b, d)]
    assert groups([]) == []


def test_halving_keeps_the_better_part_rounded_up():
    assert [Halving((0.5,), 2.0).kept(n) for n in (1, 2, 3, 8)] == [1, 1, 2, 4]
    assert [Halving((0.5,), 3.0).kept(n) for n in (1, 3, 4, 9)] == [1, 1, 2, 3]


def test_a_rung_is_a_whole_step_of_a_trials_own_run():
    halving = Halving((0.07, 0.5))
    assert (halving.step(0, 100), halving.step(1, 100), halving.step(1, 7)) == (7, 50, 4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eta": 1.9}, "eta = 1.9: below 2"),
        ({"eta": float("nan")}, "eta = nan"),
        ({"rungs": ()}, "above 0 and below 1"),
        ({"rungs": (0.0, 0.5)}, "above 0 and below 1"),
        ({"rungs": (0.5, 1.0)}, "above 0 and below 1"),
        ({"rungs": (0.5, 0.25)}, r"later than the one before.\n.*rungs=0.25,0.5"),
        ({"rungs": (0.5, 0.5)}, "later than the one before"),
    ],
)
def test_a_halving_that_cannot_work_is_refused(changes, said):
    with pytest.raises(InputError, match=said):
        dataclasses.replace(Halving((0.25, 0.5)), **changes)


def test_a_rung_before_the_end_of_warmup_is_refused():
    warming = trial("hot", optim__warmup_steps=30)
    Halving((0.31,)).check(warming, 100)
    with pytest.raises(InputError, match=r"step 30 of 100, and trial hot warms up for 30.*\n.*0\.31 or more"):
        Halving((0.3,)).check(warming, 100)
    with pytest.raises(InputError, match=r"or optim\.warmup_steps below 25"):
        Halving((0.25, 0.5)).check(warming, 100)
