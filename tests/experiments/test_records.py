"""Run folders, whole and broken, read back."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlora.experiments.log import journal
from jaxlora.experiments.records import curves, find_runs, flatten, read_run

CONFIG = {"model": {"path": "some/Model"}, "optim": {"learning_rate": 1e-4}, "seed": 0}


def folder(path, lines=(), record=None, config=CONFIG):
    path.mkdir(parents=True)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    if record is not None:
        (path / "record.json").write_text(json.dumps(record))
    if lines is not None:
        (path / "metrics.jsonl").write_text(
            "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
        )
    return path


def test_curves_keep_apart_what_was_not_logged_and_what_was_not_finite():
    rows = [
        {"step": 1, "train/nll": 3.0, "train/grad_norm": 1.0},
        {"step": 2, "eval/nll": 2.5},
        {
            "step": 2,
            "train/nll": None,
            "train/nll/nonfinite": "nan",
            "train/nonfinite": 1,
            "train/rows": "a, row 3",
        },
        {"step": 4, "train/nll": 2.0},
    ]
    train, evaluated = curves(rows)
    assert train.steps.tolist() == [1, 2, 4]
    np.testing.assert_array_equal(train.values["train/nll"], [3.0, np.inf, 2.0])
    np.testing.assert_array_equal(train.values["train/grad_norm"], [1.0, np.nan, np.nan])
    assert train.of("train/grad_norm")[0].tolist() == [1]
    assert train.of("train/nonfinite")[0].tolist() == [2]
    assert train.texts["train/rows"] == {2: "a, row 3"}
    assert (evaluated.steps.tolist(), evaluated.values["eval/nll"].tolist()) == ([2], [2.5])
    assert len(train.of("train/unheard_of")[0]) == 0


def test_of_several_values_for_a_step_the_last_counts_and_steps_ascend():
    rows = [{"step": step, "train/nll": value} for step, value in ((5, 1.0), (3, 2.0), (5, 3.0))]
    train, _ = curves([*rows, {"step": 3, "train/spike": 9.0}])
    assert train.steps.tolist() == [3, 5]
    assert train.values["train/nll"].tolist() == [2.0, 3.0]
    np.testing.assert_array_equal(train.values["train/spike"], [9.0, np.nan])


def test_a_whole_folder(tmp_path):
    run = read_run(
        folder(
            tmp_path / "Nov22_10-57",
            [{"step": 10, "train/nll": 2.0}, {"step": 20, "eval/nll": 1.9}],
            {"status": "finished", "steps": 20, "total_steps": 20},
        )
    )
    assert (run.name, run.status, run.steps, run.planned_steps) == ("Nov22_10-57", "finished", 20, 20)
    assert run.config == {"model.path": "some/Model", "optim.learning_rate": 1e-4, "seed": 0}
    assert run.problems == ()


def test_broken_lines_are_skipped_and_counted(tmp_path):
    lines = [
        {"step": 1, "train/nll": 3.0},
        "not json\n",
        "[1]\n",
        '{"step": "x"}\n',
        {"step": 2, "train/nll": 2.0},
    ]
    run = read_run(folder(tmp_path / "a", lines, {}))
    assert run.train.steps.tolist() == [1, 2]
    assert run.problems == ("metrics.jsonl: 3 lines could not be read (lines 2, 3, 4)",)


def test_two_halves_of_lines_do_not_make_one(tmp_path):
    run = read_run(folder(tmp_path / "a", ['{"step": 1\n', '"train/nll": 3.0}\n'], {}))
    assert len(run.train.steps) == 0
    assert "2 lines" in run.problems[0]


@pytest.mark.parametrize(("status", "problems"), [("running", 0), ("finished", 1)])
def test_the_half_line_of_a_live_run_is_none_of_its_problems(tmp_path, status, problems):
    run = read_run(
        folder(tmp_path / "a", [{"step": 1, "train/nll": 3.0}, '{"step": 2, "tr'], {"status": status})
    )
    assert run.train.steps.tolist() == [1]
    assert len(run.problems) == problems


def test_what_is_missing_is_said(tmp_path):
    assert read_run(folder(tmp_path / "a", [])).problems == ("record.json: is missing",)
    run = read_run(folder(tmp_path / "b", None, {}, None))
    assert run.problems == ("config.json: is missing", "metrics.jsonl: is missing")
    (tmp_path / "b" / "record.json").write_text("{")
    (tmp_path / "b" / "config.json").write_text("[]")
    assert read_run(tmp_path / "b").problems[:2] == (
        "config.json: does not hold a JSON object",
        "record.json: is not valid JSON",
    )


def test_lists_and_numbers_beyond_all_bounds_are_no_curve(tmp_path):
    lines = [{"step": 1, "train/nll": [1.0]}, {"step": 2, "train/nll": [2.0]}]
    assert read_run(folder(tmp_path / "a", lines, {})).train.values == {}
    lines = [{"step": 1, "train/nll": 10**400}, {"step": 2, "train/nll": 2.0}]
    assert read_run(folder(tmp_path / "b", lines, {})).train.of("train/nll")[0].tolist() == [2]


def test_numbers_as_python_writes_them_are_read_too(tmp_path):
    run = read_run(folder(tmp_path / "a", ['{"step": 1, "train/nll": NaN, "train/loss": Infinity}\n'], {}))
    assert run.train.values["train/loss"].tolist() == [np.inf]
    assert run.problems == ()


def test_runs_are_found_in_sweeps_too_but_not_inside_runs(tmp_path):
    for name in ("a", "sweep/one", "sweep/two"):
        folder(tmp_path / name, [], {})
    folder(tmp_path / "sweep" / "one" / "checkpoints" / "x", [], {})
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "qwen2", "hidden_size": 64}))
    folder(tmp_path / "killed_at_once", None, None)
    (tmp_path / "a" / "link").symlink_to(tmp_path)
    found = [str(path.relative_to(tmp_path)) for path in find_runs([tmp_path])]
    assert found == ["a", "killed_at_once", "sweep/one", "sweep/two"]
    assert find_runs([tmp_path / "model", tmp_path / "nothing"]) == []
    (tmp_path / "a" / "link").unlink()
    assert find_runs([tmp_path / "a"]) == [tmp_path / "a"]


def test_notes_of_both_places_once_each_in_order(tmp_path):
    path = folder(tmp_path / "a", [], {"notes": [{"time": "2025-01-02", "text": "second"}]})
    lines = [{"time": "2025-01-03", "text": "third"}, {"time": "2025-01-02", "text": "second"}]
    lines += [{"time": "2025-01-01", "text": "first"}]
    (path / "notes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{bro\n")
    run = read_run(path)
    assert run.notes == ("first", "second", "third")
    assert run.problems == ("notes.jsonl: 1 line could not be read",)


def test_when_a_run_began(tmp_path):
    """From the best evidence there is: the record, an event file, the name, the files' dates."""
    path = folder(tmp_path / "Nov22_10-57", [], {})
    by_name = read_run(path).started
    assert by_name is not None
    assert by_name % 86400 == 10 * 3600 + 57 * 60
    (path / "tensorboard").mkdir()
    for second in (1700000009, 1700000005):
        (path / "tensorboard" / f"events.out.tfevents.{second}.host").touch()
    assert read_run(path).started == 1700000005
    (path / "record.json").write_text('{"started": 7}')
    assert read_run(path).started == 7
    odd = folder(tmp_path / "Feb31_10-57", [], {})
    assert read_run(odd).started == pytest.approx((odd / "config.json").stat().st_mtime)


def test_examples_are_read_when_asked_for(tmp_path):
    path = folder(tmp_path / "a", [], {})
    (path / "eval").mkdir()
    (path / "eval" / "eval-00000020.jsonl").write_text(
        '{"example": 0, "nll": 1.5}\n{"example": 1, "nll": null}\n'
    )
    run = read_run(path)
    assert run.examples(20) == {"example": [0, 1], "nll": [1.5, None]}
    assert run.examples(10) is None
    (path / "eval" / "eval-00000020.jsonl").write_text('{"example": 0, "n')
    assert run.examples(20) is None


@pytest.mark.parametrize(
    "line", ['{"example": 0}', '{"example": [0], "nll": 1, "tokens": 2}', '{"example": 0, "nll": "1"}']
)
def test_odd_records_and_examples_do_not_stop_the_log(tmp_path, line):
    lines = [{"step": i, "train/nll": 1 + 1 / (i + 1)} for i in range(1, 30)]
    lines += [{"step": i, "eval/nll": 1 + 1 / (i + 1)} for i in range(10, 30, 5)]
    for name, version in (("a", "1"), ("b", "2")):
        record = {
            "overfit": {"since": "x"},
            "not_default": [["x"], 3],
            "versions": {"jaxlora": version},
            "devices": [],
        }
        path = folder(tmp_path / name, lines, record)
        (path / "eval").mkdir()
        for step in range(10, 30, 5):
            (path / "eval" / f"eval-{step:08d}.jsonl").write_text(f"{line}\n" * 5)
    assert len(journal([read_run(path) for path in find_runs([tmp_path])])) == 2


def test_flatten():
    assert flatten({"a": {"b": {"c": [1, 2]}}, "d": 3}) == {"a.b.c": (1, 2), "d": 3}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
RECORD = (
    "status",
    "steps",
    "total_steps",
    "reason",
    "overfit",
    "versions",
    "devices",
    "data",
    "notes",
    "not_default",
)
KEYS = (
    "model.path",
    "lora.rank",
    "lora.alpha",
    "optim.learning_rate",
    "optim.warmup_steps",
    "train.batch_size",
)
KEYS += ("optim.weight_decay", "train.max_steps", "journal.baseline", "lora.scaling", "stop.patience")


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.dictionaries(st.sampled_from(RECORD), json_values),
            st.dictionaries(st.sampled_from(KEYS), json_values),
            st.lists(
                st.dictionaries(
                    st.sampled_from(["step", "train/nll", "eval/nll", "train/grad_norm"]), json_values
                )
            ),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_nothing_that_a_folder_may_hold_stops_the_log(tmp_path_factory, made):
    root = tmp_path_factory.mktemp("odd")
    for index, (record, keys, lines) in enumerate(made):
        path = folder(root / f"run{index}", [], record, keys)
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = [read_run(path) for path in find_runs([root])]
    assert len(journal(runs)) == len(made)
