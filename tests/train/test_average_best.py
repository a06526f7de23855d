"""The best few checkpoints are kept, and the mean of their adapters is exported, evaluated and answers prompts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxlora import evaluate, export, generate
from jaxlora.runs.directory import RunDirectory


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture
def exported(run, call, tmp_path):
    """exported(*flags) -> (the folder, what was printed)."""

    def exported(*flags: Any) -> tuple[Path, str]:
        out = tmp_path / "-".join(map(str, flags))
        arguments = ["--run", run("few"), *flags, "--to", "peft", "--out", out]
        ended = call([*map(str, arguments)], export)
        assert ended.code == 0, ended.err
        return out, ended.out

    return exported


def test_the_best_few_are_kept(run):
    """No step of this run is saved for another reason, and one checkpoint would be kept without."""
    bests = RunDirectory.read(run("few")).record["bests"]
    assert [best["step"] for best in bests] == [8, 6, 4]
    assert sorted(best["eval/nll"] for best in bests) == [best["eval/nll"] for best in bests]
    assert {entry.name for entry in (run("few") / "checkpoints").iterdir()} == {"4", "6", "8"}


def test_the_average_is_the_mean_of_the_parameters_and_its_nll_that_of_evaluate(run, call, exported):
    single = [tensors(exported("--step", step)[0]) for step in (8, 6, 4)]
    folder, said = exported("--average-best", 3)
    averaged = tensors(folder)
    assert averaged.keys() == single[0].keys()
    for name, tensor in averaged.items():
        mean = np.mean([one[name].astype(np.float64) for one in single], axis=0)
        np.testing.assert_array_equal(tensor, mean.astype(np.float32), err_msg=name)
        assert (tensor != single[0][name]).any()
    ended = call(["--run", str(run("few")), "--average-best", "3", "--json"], evaluate)
    assert ended.code == 0, ended.err
    found, best = json.loads(ended.out), RunDirectory.read(run("few")).record["best"]
    assert (found["averaged"], found["step"]) == ([8, 6, 4], None)
    assert found["eval/nll"] != best["eval/nll"]
    told = f"{found['eval/nll']:.4f} (the mean of steps 8, 6, 4); {best['eval/nll']:.4f} (the best alone, step 8)"
    assert told in said
    card = (folder / "README.md").read_text()
    assert f"Its nll on the run's held-out data: {told}." in card
    assert "It is the mean of the adapters of run `few` at its best evaluations (steps 8, 6, 4)." in card
    assert card.count("averaged |") == 3


def test_the_average_of_one_is_the_best(exported):
    one, best = tensors(exported("--average-best", 1)[0]), tensors(exported("--step", "best")[0])
    assert one.keys() == best.keys()
    for name, tensor in one.items():
        np.testing.assert_array_equal(tensor, best[name], err_msg=name)


def test_generate_answers_with_the_average(run, call):
    flags = ["--average-best", "2", "--prompt", "a", "--max-new-tokens", "2"]
    ended = call(["--run", str(run("few")), *flags], generate)
    assert ended.code == 0, ended.err
    assert f"with the mean of the adapters of {run('few')} at steps 8, 6" in ended.err


def test_what_cannot_be_averaged(run, project, call, tmp_path):
    def refused(*flags: Any) -> str:
        ended = call([*map(str, flags), "--to", "peft", "--out", str(tmp_path / "out")], export)
        assert ended.code == 2, ended.err
        assert not (tmp_path / "out").exists()
        return ended.err

    for count in (4, 0, -1):
        err = refused("--run", run("few"), "--average-best", count)
        assert f"--average-best {count}: {run('few')} keeps the checkpoints of 3 of its best" in err
        assert "(steps 8, 6, 4); give a number from 1 to that" in err
        assert "a larger checkpoint.best (this one has 3)" in err
    assert "--step does not go with --average-best" in refused(
        "--run", run("few"), "--step", "best", "--average-best", 2
    )
    err = refused("--adapter", run("few") / "best", "--average-best", 2)
    assert "--average-best goes with --run" in err
