"""What differs, in words; what a run is compared with; what makes that unfair."""

from pathlib import Path

import numpy as np
import pytest

from jaxlora.experiments.baseline import baselines, changed_defaults, in_order, unfair
from jaxlora.experiments.changes import differing, number, scale
from jaxlora.experiments.records import Curves, Run

BASE = {
    "model.path": "Qwen/Qwen2.5-0.5B-Instruct",
    "model.quantize": "none",
    "model.quantize_embeddings": "none",
    "lora.rank": 16,
    "lora.alpha": 32.0,
    "lora.scaling": "alpha/r",
    "optim.learning_rate": 2e-4,
    "optim.warmup_steps": 2200,
    "train.batch_size": 128,
    "train.epochs": 3.0,
    "train.max_steps": 0,
    "data.shuffle": False,
    "stop.patience": 5,
    "lora.targets": ("q_proj", "v_proj"),
    "journal.hypothesis": "",
    "mesh.fsdp": 1,
}
SOME = Curves(np.arange(1, 4), {"train/nll": np.ones(3)})


def run(name="a", record=None, started=0.0, train=SOME, **changes):
    config = BASE | {key.replace("__", "."): value for key, value in changes.items()}
    return Run(name, Path(f"/runs/{name}"), config, record or {}, train=train, started=started)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (1e-4, "1e-4"),
        (2e-3, "2e-3"),
        (2.5e-5, "2.5e-5"),
        (0.01, "0.01"),
        (0.1, "0.1"),
        (3.0, "3"),
        (2200, "2200"),
        (0, "0"),
    ],
)
def test_numbers_as_a_person_writes_them(value, written):
    assert number(value) == written


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"optim__learning_rate": 1e-4, "optim__warmup_steps": 1000},
         ["learning rate 1e-4 instead of 2e-4", "1000 warmup steps instead of 2200"]),
        ({"data__shuffle": True}, ["shuffled data"]),
        ({"train__epochs": 5.0}, ["5 epochs instead of 3"]),
        ({"train__batch_size": 64}, ["batch 64 instead of 128"]),
        ({"train__max_steps": 100}, ["at most 100 steps"]),
        ({"stop__patience": None}, ["no longer patience of 5 evaluations"]),
        ({"lora__targets": ("q_proj",)}, ["adapters on (q_proj) instead of (q_proj, v_proj)"]),
        ({"lora__rank": 128, "lora__alpha": 256.0}, ["rank 128 instead of 16"]),
        ({"lora__rank": 128}, ["rank 128 instead of 16", "alpha/r 0.25 instead of 2"]),
        ({"lora__alpha": 16.0}, ["alpha 16 instead of 32", "alpha/r 1 instead of 2"]),
        ({"journal__hypothesis": "x", "mesh__fsdp": 8}, []),
        ({"train__batch_size": 128.0, "lora__rank": 16.0}, []),
        ({"unheard_of": 3}, []),
        ({"model__quantize": "nf4"}, ["kernels in nf4"]),
        ({"model__quantize_embeddings": "int8"}, ["embeddings in int8"]),
        ({"model__path": "/models/mine"}, ["model mine instead of Qwen/Qwen2.5-0.5B-Instruct"]),
    ],
)  # fmt: skip
def test_differences_in_words(changes, told):
    assert [change.text for change in differing(run(), run("b", **changes))] == told


def test_a_key_without_a_word_of_its_own_goes_by_its_name():
    old, new = run(per_device_train_batch_size=8), run("b", per_device_train_batch_size=4)
    assert [change.text for change in differing(old, new)] == ["per device train batch size 4 instead of 8"]


def test_scale_knows_rslora():
    assert scale({"lora.rank": 16, "lora.alpha": 32.0, "lora.scaling": "rslora"}) == 8.0
    assert scale({"lora.rank": 16}) is None


# ---- baselines -----------------------------------------------------------------------------------------------------


def chosen(*runs):
    return {
        run.name: (found.name if found else None, told)
        for run, (found, told) in zip(runs, baselines(runs), strict=True)
    }


def test_the_named_baseline_even_when_it_began_later_or_has_another_model():
    one = run("one", journal__baseline="two")
    two = run("two", started=1.0, model__path="other/Model")
    assert chosen(one, two)["one"] == ("two", "")


def test_the_baseline_that_the_record_of_an_import_names():
    assert chosen(run("one"), run("two"), run("three", record={"baseline": "two"}))["three"] == ("two", "")


def test_else_the_nearest_earlier_run_of_the_same_model():
    far = run("far", optim__learning_rate=1e-3, train__batch_size=8)
    near = run("near", optim__learning_rate=1e-4)
    other = run("other", model__path="other/Model")
    new = run("new")
    later = run("later")
    found = chosen(far, near, other, new, later)
    assert found["new"] == ("near", "")
    assert found["later"] == ("new", "")
    assert found["far"] == (None, "")
    assert found["other"] == (None, "")


def test_of_several_as_near_the_earliest():
    runs = [run(name, optim__learning_rate=rate) for name, rate in (("a", 1e-4), ("b", 2e-4), ("c", 3e-4))]
    assert chosen(*runs)["c"] == ("a", "")


def test_neither_a_diverged_run_nor_one_without_curves():
    runs = [
        run("diverged", {"status": "diverged"}),
        run("empty", train=Curves(np.zeros(0, np.int64), {})),
        run("new"),
    ]
    assert chosen(*runs)["new"] == (None, "")


def test_a_run_of_which_little_is_known_is_not_near():
    sparse = Run("sparse", Path("/s"), {"model.path": BASE["model.path"]}, train=SOME)
    known = run("known", optim__learning_rate=1e-4)
    assert chosen(sparse, known, run("new"))["new"] == ("known", "")


def test_a_baseline_that_does_not_exist_is_said():
    found = chosen(run("one"), run("two", journal__baseline="gone"), run("own", journal__baseline="own"))
    assert found["two"] == (
        "one", "its baseline gone is not among these runs; compared with the nearest earlier run, one"
    )  # fmt: skip
    assert found["own"][1].startswith("its baseline is itself (own); compared with")


def test_of_several_of_that_name_the_one_in_the_nearest_folder():
    runs = [
        Run("base", Path("/x/base"), BASE, train=SOME),
        Run("base", Path("/y/base"), BASE, train=SOME),
        Run("new", Path("/y/new"), BASE | {"journal.baseline": "base"}, train=SOME),
    ]
    (found, _) = baselines(runs)[2]
    assert found is runs[1]


def test_runs_of_unknown_beginning_come_last():
    runs = [
        run("b", started=None),
        run("a", started=None),
        run("late", started=9.0),
        run("early", started=1.0),
    ]
    assert [one.name for one in in_order(runs)] == ["early", "late", "a", "b"]


# ---- fairness ------------------------------------------------------------------------------------------------------


def record(version="0.1", train="aaaa", evaluated="bbbb", devices="1 x cpu", **more):
    data = {"train": {"fingerprint": train}, "eval": {"fingerprint": evaluated}}
    return {"versions": {"jaxlora": version}, "data": data, "devices": devices} | more


def test_other_data_and_other_hardware():
    old = run(record=record())
    assert unfair(old, run("b", record=record())) == []
    assert unfair(old, run("b", record=record(train="cccc"))) == [
        "other training data (fingerprint cccc instead of aaaa)"
    ]
    assert unfair(old, run("b", record=record(evaluated="cccc")))[0].startswith("other eval data")
    assert unfair(old, run("b", record=record(devices="8 x TPU v4"))) == [
        "other hardware (8 x TPU v4 instead of 1 x cpu)"
    ]
    assert unfair(old, run("b")) == []  # nothing is known of it


def test_a_default_that_changed_is_no_choice_of_the_person():
    old = run(record=record("0.1", not_default=["model.path"]))
    new = run("b", record=record("0.2", not_default=["model.path"]), optim__warmup_steps=100)
    assert changed_defaults(old, new) == ["optim.warmup_steps"]
    assert unfair(old, new) == [
        "jaxlora 0.1 -> 0.2: the default of optim.warmup_steps is 100 instead of 2200"
    ]


def test_a_change_by_hand_is_no_changed_default():
    old = run(record=record("0.1", not_default=[]))
    new = run("b", record=record("0.2", not_default=["optim.warmup_steps"]), optim__warmup_steps=100)
    assert changed_defaults(old, new) == []
    same_version = run("b", record=record("0.1", not_default=[]), optim__warmup_steps=100)
    assert changed_defaults(old, same_version) == []


def test_keys_that_only_one_version_has():
    old, new = run(record=record("0.1")), run("b", record=record("0.2"), optim__new_key=0.5)
    assert unfair(old, new) == ["jaxlora 0.1 -> 0.2: new is optim.new_key = 0.5"]
