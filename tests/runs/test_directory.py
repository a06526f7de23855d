"""The run folder: resumed by the same config, refused to others, whole after any failure."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxlora.core.errors import InputError
from jaxlora.runs import directory
from jaxlora.runs.directory import RunDirectory, default_path

CONFIG = {"optim": {"learning_rate": 2e-4}, "lora": {"rank": 8, "targets": ("q_proj", "v_proj")}, "seed": 0}


def test_a_new_folder_holds_the_config_and_the_same_config_resumes_it(tmp_path):
    with RunDirectory.open(tmp_path / "deep" / "run", CONFIG) as run:
        assert not run.resumed
        assert run.name == "run"
        assert json.loads((run.path / "config.json").read_text())["lora"]["targets"] == ["q_proj", "v_proj"]
    with RunDirectory.open(tmp_path / "deep" / "run", CONFIG) as run:
        assert run.resumed


def test_numbers_compare_as_json_values(tmp_path):
    RunDirectory.open(tmp_path, {"a": 1, "b": 0.0, "c": (1, 2.0)}).close()
    with RunDirectory.open(tmp_path, {"a": 1.0, "b": 0, "c": [1.0, 2]}) as run:
        assert run.resumed
    with pytest.raises(InputError, match="a is 1 there and true here"):
        RunDirectory.open(tmp_path, {"a": True, "b": 0, "c": [1, 2]})


def test_another_config_is_refused_with_what_differs_and_the_remedy(tmp_path):
    RunDirectory.open(tmp_path, CONFIG).close()
    other = {"optim": {"learning_rate": 1e-4}, "lora": {"rank": 8, "targets": "all-linear"}, "extra": 1}
    with pytest.raises(InputError) as refused:
        RunDirectory.open(tmp_path, other)
    message = str(refused.value)
    assert "optim.learning_rate is 0.0002 there and 0.0001 here" in message
    assert 'lora.targets is ["q_proj", "v_proj"] there and "all-linear" here' in message
    assert "seed is 0 there and unknown here" in message
    assert "extra is missing there and 1 here" in message
    assert "lora.rank" not in message
    assert "another --workdir" in message
    assert message.count("\n") == 1


def test_a_folder_older_than_a_key_had_the_keys_default(tmp_path):
    RunDirectory.open(tmp_path, CONFIG).close()
    newer = {**CONFIG, "lora": {**CONFIG["lora"], "kind": ("plain",)}}
    default = {"lora": {"kind": ("plain",), "rank": 1}, "seed": 5}  # of keys that it has, they say nothing
    with pytest.raises(InputError, match=r'lora.kind is missing there and "new" here'):
        RunDirectory.open(tmp_path, {**CONFIG, "lora": {**CONFIG["lora"], "kind": "new"}})
    with pytest.raises(InputError, match=r'lora.kind is \["plain"\] there and "new" here'):
        RunDirectory.open(tmp_path, {**CONFIG, "lora": {**CONFIG["lora"], "kind": "new"}}, default)
    with RunDirectory.open(tmp_path, newer, default) as run:
        assert run.resumed
        run.update_record(status="running")
    assert json.loads((tmp_path / "config.json").read_text())["lora"]["kind"] == ["plain"]


def test_a_run_may_go_on_with_another_mesh_which_is_noted_with_the_first_write(tmp_path):
    """It says where the run is computed, on however many devices, and not what."""
    meshes = [{**CONFIG, "mesh": {"data": 1, "fsdp": size}} for size in (8, 4)]
    RunDirectory.open(tmp_path, meshes[0]).close()
    run = RunDirectory.open(tmp_path, meshes[1])
    assert run.resumed
    assert json.loads((tmp_path / "config.json").read_text())["mesh"]["fsdp"] == 8  # it may be refused yet
    run.update_record(status="running")
    assert json.loads((tmp_path / "config.json").read_text())["mesh"]["fsdp"] == 4
    run.close()
    with pytest.raises(InputError, match=r"another config: seed is 0 there and 1 here\."):
        RunDirectory.open(tmp_path, {**meshes[0], "seed": 1})


def test_a_process_that_follows_writes_nothing(tmp_path):
    with RunDirectory.open(tmp_path, CONFIG) as run:
        run.update_record(status="running", steps=3)
        run.append_metrics(1, {"a": 1.0})
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        with RunDirectory.follow(tmp_path, CONFIG, run.record, run.resumed) as other:
            assert other.record["steps"] == 3
            other.update_record(steps=4)
            other.append_metrics(2, {"a": 2.0})
            other.write_evaluation(2, {"nll": [1.0]})
            other.truncate(0)
            assert other.record["steps"] == 4
            assert (other.unwritten(), other.problems()) == ([], [])
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_does_not_show_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(directory, "_VISIBLE", 0)
    with pytest.raises(InputError, match="is not seen by all processes: give a --workdir on a file system"):
        RunDirectory.follow(tmp_path / "run", CONFIG, {}, False)


def test_of_many_differences_a_few_are_named_and_the_rest_counted(tmp_path):
    RunDirectory.open(tmp_path, {f"k{i}": 0 for i in range(10)}).close()
    with pytest.raises(InputError, match=r"k3 is 0 there and 1 here; and 6 more\."):
        RunDirectory.open(tmp_path, {f"k{i}": 1 for i in range(10)})


def test_a_refused_folder_is_left_as_it_was_and_unlocked(tmp_path):
    RunDirectory.open(tmp_path, CONFIG).close()
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(InputError):
        RunDirectory.open(tmp_path, {**CONFIG, "seed": 1})
    assert (tmp_path / "config.json").read_bytes() == before
    RunDirectory.open(tmp_path, CONFIG).close()


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("chapter one")
    with pytest.raises(InputError, match=r"holds no run \(it has thesis.tex\)"):
        RunDirectory.open(tmp_path, CONFIG)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_whose_making_was_interrupted_is_taken_as_new(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / "config.json.partial").write_text('{"se')
    with RunDirectory.open(tmp_path, CONFIG) as run:
        assert not run.resumed
    assert not (tmp_path / "config.json.partial").exists()


@pytest.mark.parametrize("path", ["/proc/run", "/dev/null/run"])
def test_a_folder_that_cannot_be_written_is_refused(path):
    with pytest.raises(InputError, match=f"cannot write the run folder {path} .*another --workdir"):
        RunDirectory.open(path, CONFIG)


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path):
    hold = "import sys, time; from jaxlora.runs.directory import RunDirectory as R; "
    hold += "run = R.open(sys.argv[1], {'seed': 0}); print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match=f"in use by process {holder.pid} on .*another --workdir"):
            RunDirectory.open(tmp_path, {"seed": 0})
        holder.kill()
    with RunDirectory.open(tmp_path, {"seed": 0}) as run:
        assert run.resumed


def test_a_forked_worker_that_outlives_the_run_does_not_hold_the_lock(tmp_path):
    fork = "import os, sys, time; from jaxlora.runs.directory import RunDirectory as R; "
    fork += "run = R.open(sys.argv[1], {'seed': 0}); pid = os.fork(); print(pid, flush=True) if pid else time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", fork, str(tmp_path)], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        try:
            parent.wait(20)
            os.kill(worker, 0)  # it is still there
            RunDirectory.open(tmp_path, {"seed": 0}).close()
        finally:
            os.kill(worker, 9)


def test_read_looks_at_a_run_in_use_and_refuses_what_is_none(tmp_path):
    with RunDirectory.open(tmp_path / "run", CONFIG) as run:
        run.update_record(status="running")
        seen = RunDirectory.read(tmp_path / "run")
        assert seen.record == {"status": "running"}
        assert seen.config["lora"]["rank"] == 8
    with pytest.raises(InputError, match="is not a run folder"):
        RunDirectory.read(tmp_path)


def test_the_record_is_merged_and_survives(tmp_path):
    with RunDirectory.open(tmp_path, CONFIG) as run:
        run.update_record(status="running", best=None, steps=np.int64(3))
        run.update_record(best={"step": 5, "eval/nll": np.float32(1.5)}, status="finished")
    with RunDirectory.open(tmp_path, CONFIG) as run:
        assert run.record == {"status": "finished", "best": {"step": 5, "eval/nll": 1.5}, "steps": 3}
    assert list(run.record) == ["status", "best", "steps"]


def test_metrics_are_one_valid_object_a_line_whatever_the_numbers(tmp_path):
    with RunDirectory.open(tmp_path, CONFIG) as run:
        run.append_metrics(1, {"train/loss": float("nan"), "train/nll": np.float32("inf"), "note": "é"})
        run.append_metrics(2, {"train/loss": np.array(0.5), "train/nll": float("-inf"), "ok": True})

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    lines = [
        json.loads(line, parse_constant=refuse)
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines == [
        {"step": 1, "train/loss": None, "train/loss/nonfinite": "nan", "train/nll": None}
        | {"train/nll/nonfinite": "inf", "note": "é"},
        {"step": 2, "train/loss": 0.5, "train/nll": None, "train/nll/nonfinite": "-inf", "ok": True},
    ]
    assert run.metrics() == lines


def test_a_half_written_line_is_cut_and_later_steps_are_dropped(tmp_path):
    with RunDirectory.open(tmp_path, CONFIG) as run:
        for step in range(1, 7):
            run.append_metrics(step, {"x": step})
            run.write_evaluation(step, {"nll": [step]})
        run.write_evaluation(6, {"nll": [6]}, name="train_eval")
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(whole + b'{"step": 7, "x')
    assert len(RunDirectory.read(tmp_path).metrics()) == 6
    with RunDirectory.open(tmp_path, CONFIG) as run:
        assert (tmp_path / "metrics.jsonl").read_bytes() == whole
        run.truncate(after_step=4)
        assert [line["step"] for line in run.metrics()] == [1, 2, 3, 4]
        assert sorted(file.name for file in run.evaluations.iterdir()) == [
            f"eval-{step:08d}.jsonl" for step in (1, 2, 3, 4)
        ]
        run.append_metrics(5, {"x": 5})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(whole.splitlines(keepends=True)[:5])


def test_truncate_drops_steps_that_stand_between_earlier_ones(tmp_path):
    with RunDirectory.open(tmp_path, CONFIG) as run:
        for step in (1, 5, 2):  # a rollback leaves such an order
            run.append_metrics(step, {})
        run.truncate(after_step=2)
        assert [line["step"] for line in run.metrics()] == [1, 2]


def test_an_evaluation_is_read_as_it_was_written(tmp_path):
    columns = {"example": [4, 2, 9], "nll": np.array([0.1, np.nan, 3.0], np.float32), "tokens": [3, 4, 5]}
    with RunDirectory.open(tmp_path, CONFIG) as run:
        file = run.write_evaluation(500, columns)
        assert file == tmp_path / "eval" / "eval-00000500.jsonl"
        back = run.read_evaluation(500)
        with pytest.raises(ValueError, match="argument"):
            run.write_evaluation(1, {"a": [1], "b": [1, 2]})
    assert back["example"] == [4, 2, 9]
    assert np.float32(back["nll"][0]) == np.float32(0.1)
    assert back["nll"][1] is None
    assert back["nll/nonfinite"] == [None, "nan", None]


def test_what_a_full_disk_refuses_is_told_kept_and_written_later(tmp_path, full_disk):
    with RunDirectory.open(tmp_path, CONFIG) as run:
        run.append_metrics(1, {"x": 1})
        run.update_record(status="running")
        with full_disk(100):
            run.append_metrics(2, {"x": "y" * 200})
            run.update_record(reason="z" * 200)
            run.write_evaluation(2, {"nll": [1.5] * 100})
            assert run.metrics() == [{"step": 1, "x": 1}]
            assert RunDirectory.read(tmp_path).record == {"status": "running"}
        problems = run.problems()
        assert len(problems) == 3
        assert all("File too large" in problem and "tried again" in problem for problem in problems)
        assert run.problems() == []
        run.append_metrics(3, {})
        assert [line["step"] for line in run.metrics()] == [1, 2, 3]
        assert RunDirectory.read(tmp_path).record["reason"] == "z" * 200
        assert len(run.read_evaluation(2)["nll"]) == 100
    assert not list(tmp_path.rglob("*.partial"))


def test_the_default_path_tells_time_and_config():
    moment = (2026, 3, 7, 9, 5, 1, 0, 0, -1)

    assert default_path("configs/qwen05b.py", time.struct_time(moment)) == Path("runs/Mar07_09-05-01_qwen05b")
