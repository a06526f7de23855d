"""The export command, from a run that a person trained to folders that others load."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlora import export
from jaxlora.config.build import chosen
from jaxlora.core import cli
from jaxlora.lora.peft import save_peft
from jaxlora.lora.spec import LoraSpec
from jaxlora.runs.directory import RunDirectory

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:peft")


@pytest.fixture
def ask(capsys, monkeypatch) -> Callable[..., tuple[int, str, str]]:
    """Runs the command; gives exit code, standard output and standard error."""

    def ask(*arguments: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.run(export.main)
        return ended.value.code, *capsys.readouterr()  # type: ignore[return-value]

    return ask


def adapter(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def assert_same_adapter(one: Path, other: Path) -> None:
    (config, tensors), (other_config, others) = adapter(one), adapter(other)
    assert config == other_config
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, others[name], err_msg=name)


def logits(model: Any) -> np.ndarray:
    import torch

    tokens = np.random.default_rng(0).integers(0, 264, (2, 20))
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens)).logits.numpy()


# ---- what is written ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "variants", "ranks"])
def test_any_kept_step_is_exported_as_the_adapter_that_it_was(name, run, ask, tmp_path):
    workdir = run(name)
    record = json.loads((workdir / "record.json").read_text())
    best, last = record["best"]["step"], record["steps"]
    written = {
        "best": workdir / "best",
        "last": workdir / "last",
        best: workdir / "best",
        last: workdir / "last",
    }
    for step, expected in written.items():
        code, _, err = ask("--run", workdir, "--step", step, "--to", "peft", "--out", tmp_path / str(step))
        assert code == 0, err
        assert_same_adapter(tmp_path / str(step), expected)
        files = {entry.name for entry in (tmp_path / str(step)).iterdir()}
        assert files == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert best < last or name != "plain"
    assert {entry.name for entry in tmp_path.iterdir()} == {*map(str, written)}


@pytest.mark.parametrize("name", ["variants", "ranks"])
def test_merged_and_beside_the_base_are_one_model(name, run, ask, project, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for to in ("peft", "merged"):
        size = ("--max-shard-size", "20kb") if to == "merged" else ()
        code, out, err = ask("--run", run(name), "--to", to, "--out", tmp_path / to, *size)
        assert code == 0, err
        assert f"folder        {tmp_path / to}" in out
        assert f"jaxlora.generate --{'model' if to == 'merged' else 'adapter'} {tmp_path / to}" in out
        assert ("vLLM does not load DoRA adapters: export with --to merged" in out) == (
            (name, to) == ("variants", "peft")
        )
    assert len(list((tmp_path / "merged").glob("model-*-of-*.safetensors"))) > 2
    bare = logits(AutoModelForCausalLM.from_pretrained(project.model))
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto"))
    assert np.abs(merged - bare).max() > 0.1
    base = AutoModelForCausalLM.from_pretrained(project.model)
    beside = peft.PeftModel.from_pretrained(base, tmp_path / "peft")
    assert np.abs(logits(beside) - merged).max() < 1e-4
    assert np.abs(logits(beside.merge_and_unload()) - merged).max() < 1e-5
    messages = [{"role": "user", "content": "abc"}]
    theirs, ours = (AutoTokenizer.from_pretrained(folder) for folder in (project.model, tmp_path / "merged"))
    assert ours.chat_template == theirs.chat_template
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(messages)
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "merged" / file).read_bytes() == (project.model / file).read_bytes()


def test_the_card_says_what_it_is_and_how_it_was_made(run, ask, project, tmp_path):
    workdir = run("plain")
    record = json.loads((workdir / "record.json").read_text())
    assert ask("--run", workdir, "--to", "peft", "--out", tmp_path / "out")[0] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    best = record["best"]
    for words in (
        "---\nlibrary_name: peft\n", f"A LoRA adapter for `{project.model}`.", "rank 4, alpha 8 (scale 2) on q_proj, ",
        f"run `plain` at step {best['step']} (the best). The run: 8 steps, ",
        f"| train | `{project.folder / 'train.jsonl'}` |",
        record["data"]["train"]["fingerprint"], "| 60 |", "| `optim.learning_rate` | `0.2` |",
        "| `lora.targets` | `all-linear` |", f"| {best['step']} | {best['eval/nll']:.4f} |", "best, exported |",
        f"jax {jax.__version__}", f'base = AutoModelForCausalLM.from_pretrained("{project.model}", dtype="auto")',
        'PeftModel.from_pretrained(base, "out")', "--max-lora-rank 8 --lora-modules adapter=out",
    ):  # fmt: skip
        assert words in card, words
    assert "optim.b1" not in card


def test_an_adapter_folder_is_exported_with_what_is_known(run, ask, project, tmp_path):
    folder = run("plain") / "best"
    code, _, err = ask("--adapter", folder, "--to", "merged", "--out", tmp_path / "deep/er/out")
    assert code == 0, err
    assert ask("--run", run("plain"), "--to", "merged", "--out", tmp_path / "run")[0] == 0
    one, other = (load_file(tmp_path / x / "model.safetensors") for x in ("deep/er/out", "run"))
    assert all(np.array_equal(tensor, other[name]) for name, tensor in one.items())
    card = (tmp_path / "deep/er/out/README.md").read_text()
    assert "library_name: transformers" in card
    assert f"exported from `{folder}`" in card
    assert "## Data" not in card
    # onto a base that it does not name
    moved = shutil.copytree(project.model, tmp_path / "moved")
    arguments = "--adapter", folder, "--model", moved, "--to", "peft", "--out", tmp_path / "named"
    assert ask(*arguments)[0] == 0
    assert adapter(tmp_path / "named")[0]["base_model_name_or_path"] == str(moved)


def test_a_run_stands_on_the_commit_that_it_was_trained_on(tmp_path):
    """Its branch may have moved since."""
    config = {"model": {"path": "o/n", "revision": "main"}, "data": {"train": "x"}}
    RunDirectory.open(tmp_path / "run", config).close()
    save_peft(tmp_path / "run/last", {}, LoraSpec(), "o/n", "0123abcd")
    save_peft(tmp_path / "run/best", {}, LoraSpec(), "o/n", "0123abcd")
    for step in ("best", "last", "5"):
        arguments = export._parse(
            ["--run", str(tmp_path / "run"), "--step", step, "--to", "peft", "--out", str(tmp_path / "x")]
        )
        assert chosen.choose(arguments).revision == "0123abcd"


# ---- nothing half done --------------------------------------------------------------------------------------------


def test_a_full_disk_is_a_line_and_leaves_nothing(run, ask, tmp_path, full_disk):
    for to, size in (("merged", 30_000), ("merged", 80_000), ("peft", 2_000)):
        workdir = run("plain")
        with full_disk(size):
            code, _, err = ask("--run", workdir, "--to", to, "--out", tmp_path / "out")
        assert code == 2
        (line,) = err.splitlines()
        assert line.startswith(f"error: {tmp_path / 'out'} could not be written (File too large); what was")
        assert list(tmp_path.iterdir()) == []
    assert ask("--run", workdir, "--to", "merged", "--out", tmp_path / "out")[0] == 0


SLOW = """
import sys, time
from jaxlora import export
from jaxlora.core import cli
from jaxlora.lora import merged
merge = merged.merge_stored
merged.merge_stored = lambda *args: (print("merging", flush=True), time.sleep(float(0.3)), merge(*args))[2]
cli.run(export.main)
"""


def test_a_kill_leaves_nothing_that_looks_like_a_model_and_the_next_export_cleans_up(run, ask, tmp_path):
    arguments = ["--run", str(run("plain")), "--to", "merged", "--out", str(tmp_path / "out")]
    arguments += ["--max-shard-size", "5KB"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout is not None
    for _ in range(4):
        while "merging" not in process.stdout.readline():
            assert process.poll() is None
    # another one, meanwhile
    code, _, err = ask(*arguments)
    assert code == 2
    assert f"is in use by process {process.pid} " in err
    assert "give another --out" in err
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert [entry.name for entry in tmp_path.iterdir()] == [".out.partial"]
    assert len(list((tmp_path / ".out.partial").glob("*.safetensors"))) > 0
    assert ask(*arguments[:-2])[0] == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    names = {entry.name for entry in (tmp_path / "out").iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


# ---- bad input ----------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(ask, tmp_path) -> Callable[..., str]:
    """refused(arguments...) runs the command, checks that it is refused in two lines, and returns them."""

    def refused(*arguments: Any) -> str:
        out = () if "--out" in arguments else ("--out", tmp_path / "not/there")
        code, _, err = ask(*arguments, *out)
        assert code == 2, err
        assert err.startswith("error: ")
        assert len(err.splitlines()) <= 3, err
        assert not (tmp_path / "not").exists()
        return err

    return refused


def test_arguments_that_mean_nothing(refused, tmp_path, monkeypatch):
    merged = "--adapter", "x", "--to", "merged"
    assert "an export needs an adapter: name it with --run" in refused("--model", "x", "--to", "peft")
    assert "invalid choice: 'gguf'" in refused("--adapter", "x", "--to", "gguf")
    for size in ("5", "x GB", "0GB", "-1MB", "5GiB", "nanMB"):
        assert f"--max-shard-size {size} must be a size such as 5GB" in refused(
            *merged, f"--max-shard-size={size}"
        )
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a").touch()
    assert "full is not empty (it has a)" in refused(*merged, "--out", tmp_path / "full")
    assert "a is a file" in refused(*merged, "--out", tmp_path / "full/a")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "name a folder inside it, such as model" in refused(*merged, "--out", ".")
    assert "there is no option --dtype" in refused(*merged, "--dtype", "float32")


def test_folders_that_are_no_adapters(refused, run, project, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder, said in (
        ("nowhere", "does not exist"),
        (empty, "has no adapter_config"),
        (project.model, "has no a"),
    ):
        assert f"adapter folder {folder} {said}" in refused("--adapter", folder, "--to", "merged")
    (empty / "adapter_config.json").write_bytes((run("plain") / "best/adapter_config.json").read_bytes())
    assert f"{empty} has no adapter_model.safetensors" in refused("--adapter", empty, "--to", "peft")


def test_a_step_that_is_not_kept(refused, run):
    err = refused("--run", run("plain"), "--step", 7, "--to", "peft")
    assert "keeps no checkpoint of step 7; kept are: 4, 6, 8 (and best, last)" in err


@pytest.mark.parametrize("to", ["peft", "merged"])
def test_an_adapter_of_rank_0(to, refused, run, tmp_path):
    folder = shutil.copytree(run("plain") / "best", tmp_path / "zero")
    config = json.loads((folder / "adapter_config.json").read_text()) | {"r": 0}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert f"{folder}/adapter_config.json: lora.rank is 0; it must be a positive integer" in refused(
        "--adapter", folder, "--to", to
    )


@pytest.mark.parametrize("to", ["peft", "merged"])
def test_an_adapter_for_another_base(to, refused, run, project, tmp_path):
    folder = shutil.copytree(run("plain") / "best", tmp_path / "other")
    config, tensors = adapter(folder)
    narrow = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"
    save_file({**tensors, narrow: tensors[narrow][:8].copy()}, folder / "adapter_model.safetensors")
    err = refused("--adapter", folder, "--to", to)
    assert "does not fit this base (qwen2, 2 layers, hidden size 32)" in err
    assert "layers.1.self_attn.k_proj.lora_B.weight is [8, 4] instead of [16, 4]" in err
    renamed = {name.replace("k_proj", "key_proj"): x for name, x in tensors.items()}
    save_file(renamed, folder / "adapter_model.safetensors")
    assert "layers.0.self_attn.key_proj.lora_A.weight" in refused("--adapter", folder, "--to", to)
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["c_attn"]}))
    save_file(tensors, folder / "adapter_model.safetensors")
    assert "unknown lora.targets 'c_attn'" in refused("--adapter", folder, "--to", to)


def test_bases_that_cannot_be_merged_into(refused, run, project, tmp_path):
    folder = run("plain") / "best"
    merge = "--adapter", folder, "--to", "merged", "--model"
    base = shutil.copytree(project.model, tmp_path / "base")
    (base / "model.safetensors").unlink()
    err = refused(*merge, base)
    assert f"the adapter's base cannot be had: {base} has neither model.safetensors nor" in err
    assert f"--adapter {folder} --model FOLDER_OR_ID" in err
    err = refused(*merge, "some/where")
    assert "model.path 'some/where' is not a local folder, not complete in the local cache" in err
    shutil.rmtree(base)
    shutil.copytree(project.model, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    err = refused(*merge, base)
    assert f"the base {base} is quantised (quant_method 'gptq'): an adapter is merged into weights" in err
    # quantised, and not said so
    (base / "config.json").write_text(json.dumps(config))
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].astype(np.int8)}, base / "model.safetensors")
    assert f"1 of a type other than F64, F32, F16, BF16 ({name} is I8)" in refused(*merge, base)
    (base / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    assert f"the base {base}: config.json has model_type 'bert'" in refused(*merge, base)


def test_help_comes_at_once(repository):
    """Best of three, so that a busy machine does not count."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        command = [sys.executable, "-m", "jaxlora.export", "--help"]
        ended = subprocess.run(
            command, cwd=repository, capture_output=True, text=True, check=True, env=os.environ
        )
        seconds.append(time.perf_counter() - started)
        assert "--max-shard-size" in ended.stdout
    assert min(seconds) < 1.5
