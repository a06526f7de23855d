"""A run over a base in four bits, and every command that is pointed at it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxlora import evaluate, export, generate
from jaxlora.config.build import generation, inputs


def last_line(workdir: Path) -> dict[str, Any]:
    """Of metrics.jsonl, about the last evaluation."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval/nll" in line][-1]


@pytest.fixture
def loaded(monkeypatch) -> list[tuple[str, str]]:
    """What kernels and tables of the bases that are loaded from now on are kept in."""
    kept, load = [], inputs.base

    def base(model, progress=None):
        kept.append((model.quantize, model.quantize_embeddings))
        return load(model, progress)

    monkeypatch.setattr(inputs, "base", base)
    return kept


def test_it_learns_and_says_what_it_stands_on(project, call, tmp_path):
    ended = call(project.arguments(tmp_path / "run", model__quantize="int8"))
    assert ended.code == 0, ended.err
    assert "M parameters, int8 and float32)" in ended.out
    record = json.loads((tmp_path / "run/record.json").read_text())
    assert record["best"]["eval/nll"] < 0.9 * record["first"]["eval/nll"]
    other = call(project.arguments(tmp_path / "run", model__quantize="nf4"))
    assert other.code == 2
    assert 'another config: model.quantize is "int8" there and "nf4" here' in other.err


def test_it_learns_over_embeddings_in_fewer_bits(project, call, tmp_path):
    settings = {"model__quantize": "int8", "model__quantize_embeddings": "nf4"}
    ended = call(project.arguments(tmp_path / "run", **settings))
    assert ended.code == 0, ended.err
    assert "M parameters, int8 and float32, embeddings in nf4)" in ended.out
    record = json.loads((tmp_path / "run/record.json").read_text())
    assert record["best"]["eval/nll"] < 0.9 * record["first"]["eval/nll"]
    other = call(project.arguments(tmp_path / "run", model__quantize="int8"))
    assert other.code == 2
    assert 'another config: model.quantize_embeddings is "nf4" there and "none" here' in other.err


@pytest.mark.slow
def test_the_quickstart_learns_in_four_bits_too(call, repository, tmp_path):
    """From 5.5992 to 0.30 in 20 steps; in bfloat16 from 5.5906 to 0.32."""
    arguments = ["--config", str(repository / "configs/quickstart.py"), "--workdir", str(tmp_path / "run")]
    changed = {"model.quantize": "nf4", "train.max_steps": 20, "eval.every": 20, "eval.generate": 0}
    ended = call([*arguments, *(f"--config.{key}={value}" for key, value in changed.items())])
    assert ended.code == 0, ended.err
    record = json.loads((tmp_path / "run/record.json").read_text())
    assert record["first"]["eval/nll"] == pytest.approx(5.5992, abs=4e-3)
    assert record["best"]["eval/nll"] < 0.5


@pytest.mark.slow
@pytest.mark.parametrize(("name", "option"), [("nf4", "--quantize"), ("tables", "--quantize-embeddings")])
def test_it_is_evaluated_as_in_training_unless_asked_otherwise(run, call, loaded, project, name, option):
    workdir = run(name)
    key = option[2:].replace("-", "_")
    kinds = {"quantize": "none", "quantize_embeddings": "none"}
    loaded.clear()  # the run's own
    ended = call(["--run", str(workdir), "--step", "last", "--json"], evaluate)
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    line = {name: value for name, value in last_line(workdir).items() if name.startswith("eval/")}
    assert {name: found[name] for name in line} == line
    assert found["dtype"] == "float32"
    assert {key: found[key] for key in kinds} == kinds | {key: "nf4"}
    ended = call(["--run", str(workdir), "--step", "last", "--json", option, "none"], evaluate)
    assert ended.code == 0, ended.err
    other = json.loads(ended.out)
    assert {key: other[key] for key in kinds} == kinds
    assert 1e-5 < abs(other["eval/nll"] - found["eval/nll"]) < 0.1 * found["eval/nll"]
    bare = ["--model", str(project.model), "--data", str(project.folder / "eval.jsonl"), "--json"]
    ended = call([*bare, option, "int8"], evaluate)
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)[key] == "int8"
    expected = [tuple((kinds | {key: kind}).values()) for kind in ("nf4", "none", "int8")]
    assert loaded == expected


@pytest.mark.slow
@pytest.mark.parametrize(("name", "option"), [("nf4", "--quantize"), ("tables", "--quantize-embeddings")])
def test_it_answers_with_the_base_that_it_was_trained_on_unless_asked_otherwise(
    run, call, loaded, project, name, option
):
    workdir = run(name)
    loaded.clear()
    for base in (["--run", str(workdir)], ["--model", str(project.model), option, "int8"]):
        ended = call([*base, "--prompt", "a", "--max-new-tokens", "4"], generate)
        assert ended.code == 0, ended.err
    place = ["--quantize", "--quantize-embeddings"].index(option)
    assert [kept[place] for kept in loaded] == ["nf4", "int8"]
    assert [kept[1 - place] for kept in loaded] == ["none", "none"]


def test_answers_are_shared_out_over_whole_blocks(project, devices):
    devices(8)
    sizes = {
        kind: generation.answering_model(str(project.model), "", "float32", kind).mesh.size
        for kind in ("none", "nf4")
    }
    assert sizes == {"none": 2, "nf4": 1}  # two key heads; one block of 32 inputs


def test_its_adapter_is_an_ordinary_one_and_is_merged_only_by_its_own_name(run, call, project, tmp_path):
    workdir = run("nf4")
    refused = call(["--run", str(workdir), "--to", "merged", "--out", str(tmp_path / "whole")], export)
    assert refused.code == 2
    assert len(refused.err.splitlines()) == 2, refused.err
    assert "was trained over kernels in nf4 (model.quantize)" in refused.err
    assert "--to peft" in refused.err
    assert f"--to merged --adapter {workdir / 'best'}." in refused.err
    assert not (tmp_path / "whole").exists()

    ended = call(["--run", str(workdir), "--to", "peft", "--out", str(tmp_path / "adapter")], export)
    assert ended.code == 0, ended.err
    said = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert said["peft_type"] == "LORA"
    assert not any("quant" in key for key in said)
    mine, theirs = (
        load_file(folder / "adapter_model.safetensors") for folder in (workdir / "best", tmp_path / "adapter")
    )
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name])

    named = ["--adapter", str(tmp_path / "adapter"), "--to", "merged", "--out", str(tmp_path / "whole")]
    ended = call(named, export)
    assert ended.code == 0, ended.err
    stored = load_file(project.model / "model.safetensors")
    merged = load_file(tmp_path / "whole/model.safetensors")
    assert {x.dtype for x in merged.values()} == {np.dtype(np.float32)}
    change = np.abs(merged["model.layers.0.mlp.up_proj.weight"] - stored["model.layers.0.mlp.up_proj.weight"])
    assert 0 < change.max() < 0.2
    np.testing.assert_array_equal(merged["model.norm.weight"], stored["model.norm.weight"])


def test_what_was_trained_over_other_embeddings_is_merged_only_by_its_own_name(run, call, tmp_path):
    workdir = run("tables")
    arguments = ["--run", str(workdir), "--out", str(tmp_path / "whole"), "--to"]
    refused = call([*arguments, "merged"], export)
    assert refused.code == 2
    assert len(refused.err.splitlines()) == 2, refused.err
    assert "was trained over embeddings in nf4 (model.quantize_embeddings)" in refused.err
    assert f"--to merged --adapter {workdir / 'best'}." in refused.err
    assert not (tmp_path / "whole").exists()
    assert call([*arguments, "peft"], export).code == 0
