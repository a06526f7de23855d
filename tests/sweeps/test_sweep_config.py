"""A sweep's config: which trials it means, what they are called, and what is refused."""

import random

import pytest

from jaxlora.config.load import parse_arguments
from jaxlora.config.sweep import SWEEP_KEYS, described, find_sweep_key, load_sweep
from jaxlora.core.errors import InputError
from jaxlora.sweeps.ranges import draws, ranges
from jaxlora.sweeps.trials import Halving, flat, named, shown

RATE = "optim.learning_rate"


@pytest.fixture
def write(tmp_path):
    """Writes a base and a sweep over it; returns the sweep's path."""
    (tmp_path / "base.py").write_text(
        "from jaxlora.config.load import base_config\n\n\ndef get_config(steps='100'):\n"
        "    config = base_config()\n    config.model.path, config.data.train = 'm', 'd'\n"
        "    config.train.max_steps, config.optim.warmup_steps = int(steps), 10\n    return config\n"
    )

    def write(*lines, base="base.py"):
        path = tmp_path / "sweep.py"
        body = "\n".join(f"    config.sweep.{line}" for line in lines)
        path.write_text(
            "from jaxlora.config.sweep import sweep_config\n\n\ndef get_config():\n"
            f"    config = sweep_config({str(tmp_path / base)!r})\n{body}\n    return config\n"
        )
        return str(path)

    return write


def refusal(argument, *overrides):
    with pytest.raises(InputError) as caught:
        load_sweep(argument, overrides)
    said = str(caught.value)
    assert said.count("\n") <= 1
    return said


# ---- which trials -----------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination(write):
    sweep = load_sweep(write(f"grid = {{'{RATE}': [1e-4, 2e-4], 'lora.rank': [8, 16]}}"))
    values = [(t.config.optim.learning_rate, t.config.lora.rank) for t in sweep.trials]
    assert values == [(1e-4, 8), (1e-4, 16), (2e-4, 8), (2e-4, 16)]
    assert [t.name for t in sweep.trials][:2] == [
        "learning_rate=0.0001,rank=8",
        "learning_rate=0.0001,rank=16",
    ]


def test_keys_joined_by_a_comma_go_together(write):
    sweep = load_sweep(write("grid = {'lora.rank,lora.alpha': [(8, 16), (16, 32)], 'seed': [0, 1]}"))
    assert [(t.config.lora.rank, t.config.lora.alpha, t.config.seed) for t in sweep.trials] == [
        (8, 16.0, 0), (8, 16.0, 1), (16, 32.0, 0), (16, 32.0, 1)
    ]  # fmt: skip


def test_listed_trials_name_themselves_or_are_named(write):
    sweep = load_sweep(write(f"trials = [{{'name': 'hot', '{RATE}': 1e-2}}, {{'seed': 1}}, {{}}]"))
    assert [(t.name, t.changes) for t in sweep.trials] == [
        ("hot", {RATE: 1e-2}),
        ("seed=1", {"seed": 1}),
        ("base", {}),
    ]


def test_a_trial_differs_from_the_base_in_its_changes_alone(write):
    sweep = load_sweep(write(f"grid = {{'{RATE}': [1e-4, 3e-4]}}"))
    base = flat(sweep.base)
    for trial in sweep.trials:
        assert {
            key: value for key, value in flat(trial.config).items() if value != base[key]
        } == trial.changes


def test_draws_are_those_of_a_longer_list_cut_short(write):
    lines = f"random.ranges = {{'{RATE}': ('log_uniform', 1e-5, 1e-3)}}"
    three = load_sweep(write(lines, "random.count = 3")).trials
    five = load_sweep(write(lines, "random.count = 5")).trials
    assert five[:3] == three
    assert load_sweep(write(lines, "random.count = 3", "random.seed = 1")).trials != three


def test_overrides_reach_base_and_sweep(write):
    path = write(f"grid = {{'{RATE}': [1e-4, 2e-4]}}")
    sweep = load_sweep(
        path,
        ["--config.base.train.max_steps=50", "--config.sweep.at_once=2", "--config.sweep.halving.rungs=0.25,0.5",
         "--config.sweep.grid={'seed': [1, 2, 3]}"],
    )  # fmt: skip
    assert [t.config.train.max_steps for t in sweep.trials] == [50] * 3
    assert sweep.at_once == 2
    assert sweep.halving == Halving((0.25, 0.5), 2.0, False)
    assert load_sweep(path, ["--config.sweep.halving.rungs="]).halving is None


def test_a_bare_switch_is_true():
    import argparse

    found = parse_arguments(argparse.ArgumentParser(), ["--config.sweep.halving.drop_ties"], find_sweep_key)
    assert found[1] == ("--config.sweep.halving.drop_ties=true",)


def test_a_base_takes_a_parameter(write):
    assert load_sweep(write("trials = [{}]", base="base.py:70")).base.train.max_steps == 70


def test_a_search_is_given_no_trials(write):
    sweep = load_sweep(
        write(f"search.ranges = {{'{RATE}': ('log_uniform', 1e-5, 1e-3)}}", "search.waves = 2")
    )
    assert sweep.trials == ()
    assert sweep.search is not None
    assert (sweep.search.waves, sweep.search.trials, sweep.search.sampler) == (2, 8, "tpe")


def test_a_sweep_is_described_by_what_decides_it(write):
    path = write(f"grid = {{'{RATE}': [1e-4, 2e-4]}}")
    assert described(load_sweep(path)) == described(load_sweep(path))
    assert described(load_sweep(path)) != described(load_sweep(path, ["--config.sweep.halving.rungs=0.5"]))


# ---- names ------------------------------------------------------------------------------------------------------


def test_names_are_short_and_readable():
    assert named([{RATE: 2e-4, "lora.rank": 16}]) == ["learning_rate=0.0002,rank=16"]
    assert named([{"eval.every": 5, "checkpoint.every": 5}]) == ["eval.every=5,checkpoint.every=5"]
    assert named([{"data.train": "some/where/mine.jsonl", "stop.patience": None}]) == [
        "train=mine.jsonl,patience=none"
    ]
    assert named([{"lora.targets": ("q_proj", "v_proj"), "data.packing": False}]) == [
        "targets=q_proj+v_proj,packing=false"
    ]


def test_names_are_unique_and_fit_for_a_folder():
    long = {f"{section}.every": 10**40 for section in ("eval", "log", "checkpoint")}
    names = named(
        [{"data.train": "a/x"}, {"data.train": "b/x"}, {"data.train": "a b:c"}, long], taken=["train=x"]
    )
    assert names == ["train=x-2", "train=x-3", "train=a-b-c", "trial-05"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(2e-4, "0.0002"), (1e-5, "1e-05"), (0.1234567, "0.1234567"), (128, "128"), (True, "true")],
)
def test_values_are_shown_as_a_person_writes_them(value, text):
    assert shown(value) == text


# ---- ranges -----------------------------------------------------------------------------------------------------


def test_draws_lie_in_their_range_in_the_keys_type():
    found = ranges(
        "r", {RATE: ("log_uniform", 1e-5, 1e-3), "lora.rank": ("uniform", 2, 64), "seed": ("choice", 3, 5)}
    )
    drawn = draws(found, 200, 0)
    assert all(1e-5 <= one[RATE] <= 1e-3 and isinstance(one[RATE], float) for one in drawn)
    assert {type(one["lora.rank"]) for one in drawn} == {int}
    assert {one["seed"] for one in drawn} == {3, 5}
    below = sum(one[RATE] < 1e-4 for one in drawn)
    assert 70 < below < 130  # half of the logarithms
    assert all(float(f"{one[RATE]:.3g}") == one[RATE] for one in drawn)


def test_a_uniform_range_is_even_in_its_numbers():
    (found,) = ranges("r", {"lora.dropout": ("uniform", 0.0, 0.5)}).values()
    values = [found.draw(random.Random(seed)) for seed in range(200)]
    assert 70 < sum(value < 0.25 for value in values) < 130


# ---- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("grid = {}", "the sweep has no trials.\nGive it some"),
        ("grid = {'optim.learning_rat': [1e-4]}", "unknown config key optim.learning_rat: did you mean optim"),
        ("trials = [{'learning_rate': 1e-4}]", "trial learning_rate=0.0001: unknown config key learning_rate: did"),
        (f"grid = {{'{RATE}': []}}", f"sweep.grid['{RATE}'] = []: it needs a list"),
        (f"grid = {{'{RATE}': 1e-4}}", f"sweep.grid['{RATE}'] = 0.0001: it needs a list"),
        (f"grid = {{'{RATE}': [1e-4, -1.0]}}", f"trial learning_rate=-1: {RATE} = -1.0 is not allowed"),
        (f"grid = {{'{RATE}': [1e-4, 1e-4]}}", "the trials learning_rate=0.0001 and learning_rate=0.0001-2 are the"),
        ("trials = [{'seed': 0}]\n    config.sweep.grid = {'seed': [1, 0]}", "the trials seed=0 and seed=0-2 are"),
        ("trials = [{}, {'journal.hypothesis': 'x'}]", "the trials base and base-2 are the same run"),
        ("trials = [{'name': 'a', 'seed': 1}, {'name': 'a', 'seed': 2}]", "2 trials are called a"),
        ("trials = [{'name': '../a', 'seed': 1}]", "a trial is named '../a'"),
        ("trials = [5]", "sweep.trials holds 5: a trial is a dict"),
        ("trials = [{'train.batch_size': 12}]", "trial batch_size=12: train.batch_size = 12 is not divisible"),
        ("grid = {'lora.rank,lora.alpha': [(8, 16.0), 16]}", "sweep.grid['lora.rank,lora.alpha'] has 16: keys"),
        ("gird = {}", "unknown sweep key sweep.gird: did you mean sweep.grid?"),
        ("halving.rung = (0.5,)", "unknown sweep key sweep.halving.rung: did you mean sweep.halving.rungs?"),
        ("at_once = -1", "sweep.at_once = -1 is not allowed"),
        ("random.ranges = {'seed': ('choice', 1, 2)}", "sweep.random.count = 8, but these ranges gave only 2"),
        (f"random.ranges = {{'{RATE}': ('log_uniform', 0.1, 0.01)}}", "sweep.random.ranges['optim.learning_rate']"),
        (f"random.ranges = {{'{RATE}': ('normal', 0.1, 0.2)}}", "sweep.random.ranges['optim.learning_rate']"),
        ("random.ranges = {'lora.dropout': ('log_uniform', 0.0, 0.5)}", "sweep.random.ranges['lora.dropout']"),
        ("random.ranges = {'optim.lr': ('uniform', 0.1, 0.2)}", "unknown config key optim.lr"),
    ],
)  # fmt: skip
def test_wrong_trials_are_refused(write, line, said):
    assert refusal(write(line)).startswith(said)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("halving.eta = 1.5", "sweep.halving.eta = 1.5: below 2"),
        ("halving.rungs = (0.5, 0.25)", "sweep.halving.rungs = (0.5, 0.25): each rung must be later"),
        ("halving.rungs = (0.1,)", "sweep.halving.rungs: the first, 0.1, is step 10 of 100, and trial seed=1 warms"),
        ("halving.rungs = ('half',)", "sweep.halving.rungs = ('half',) is not allowed"),
        ("halving.rungs = 0.5", "sweep.halving.rungs = 0.5 (float) is not allowed"),
        ("search.ranges = {'seed': ('choice', 1, 2)}", "sweep.search proposes its own trials"),
    ],
)  # fmt: skip
def test_a_halving_or_search_that_cannot_work_is_refused(write, line, said):
    lines = [line] if "rungs" in line or "search" in line else [line, "halving.rungs = (0.5,)"]
    assert refusal(write("grid = {'seed': [1, 2]}", *lines)).startswith(said)


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        (
            "--config.train.max_steps=5",
            "unknown sweep key train.max_steps: did you mean base.train.max_steps?",
        ),
        (
            "--config.base.train.max_step=5",
            "unknown config key train.max_step: did you mean train.max_steps?",
        ),
        ("--config.sweep.eta=3", "unknown sweep key sweep.eta: did you mean sweep.halving.eta?"),
        ("--config.sweep.grid=[1", "sweep.grid = '[1' (str) is not allowed"),
        ("--sweep.at_once=1", "--sweep.at_once=1 is no override"),
    ],
)
def test_wrong_overrides_are_refused(write, flag, said):
    assert refusal(write("grid = {'seed': [1, 2]}"), flag).startswith(said)


def test_a_plain_config_is_no_sweep(write, tmp_path):
    write("grid = {}")
    assert refusal(str(tmp_path / "base.py")).endswith("configs/sweeps/ has examples.")


def test_every_key_has_its_default_in_a_new_sweep(write):
    from jaxlora.config.sweep import sweep_config

    config = sweep_config(str(write("grid = {}")).replace("sweep.py", "base.py"))
    for path, key in SWEEP_KEYS.items():
        found = config
        for name in path.split("."):
            found = found[name]
        assert found == key.default
    config.sweep.grid[RATE] = [1]
    assert SWEEP_KEYS["sweep.grid"].default == {}
