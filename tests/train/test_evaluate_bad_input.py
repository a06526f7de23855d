"""Whatever the evaluate command is given wrong is answered in a line or two, before the base is read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from jaxlora import evaluate


@pytest.fixture
def refused(call, run, monkeypatch) -> Callable[..., str]:
    """refused((arguments), words, ...) checks that the command says these words, before it reads the base."""

    run("plain")  # reads the base too, when it is trained

    def never(*_: Any) -> None:
        raise AssertionError("the base was read")

    monkeypatch.setattr("jaxlora.config.build.inputs.base", never)

    def refused(arguments: tuple[Any, ...], *words: Any) -> str:
        ended = call([*map(str, arguments)], evaluate)
        assert (ended.code, ended.out) == (2, ""), ended
        error = ended.err[ended.err.index("error: ") :]
        assert len(error.splitlines()) <= 2, error
        assert "--config." not in error
        missing = [str(word) for word in words if str(word) not in error]
        assert not missing, f"{missing} not in: {error}"
        return error

    return refused


def test_nothing_to_score(refused, run, project, tmp_path):
    base = "--model", project.model
    refused((), "--run FOLDER", "--adapter FOLDER", "--model")
    refused(("--run", "nowhere"), "nowhere is not a run folder")
    refused(("--adapter", "nowhere"), "adapter folder nowhere does not exist")
    refused(("--model", "./nowhere", "--data", "x.jsonl"), "--model './nowhere' does not exist")
    refused(base, "--data F")
    refused((*base, "--data", tmp_path / "none.jsonl"), "none.jsonl does not exist", "--data takes a hub id")
    refused((*base, "--split", "test"), "--split goes with --data")
    refused(("--run", run("plain"), *base), "--model does not go with --run")
    refused(("--run", run("plain"), "--step", "5"), "no checkpoint of step 5", "4, 6, 8")
    refused(("--run", run("plain"), "--step", "worst"), "best, last")


def test_an_adapter_of_another_base(refused, run, project, tmp_path):
    adapter = Path(shutil.copytree(run("plain") / "best", tmp_path / "adapter"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    tensors[name] = tensors[name][:63]
    save_file(tensors, adapter / "adapter_model.safetensors")
    data = "--data", project.folder / "eval.jsonl", "--max-length", 48
    refused(("--adapter", adapter, *data), "does not fit this base", "layers.1.mlp.up_proj.lora_B", "[63, 4]")


def test_impossible_values(refused, run, tmp_path):
    plain = "--run", run("plain")
    refused((*plain, "--metrics", "nll", "wer"), "--metrics wer", "nll, perplexity, token_accuracy")
    refused((*plain, "--max-length", 65), "--max-length 65", "64 positions", "set --max-length=64 or less")
    refused((*plain, "--batch-size", 0), "--batch-size 0", "at least 1", "--batch-size=8")
    refused((*plain, "--generate", -1), "--generate -1", "at least 0")
    refused((*plain, "--generate", 2, "--max-new-tokens", 64), "--max-new-tokens 64", "--max-new-tokens=32")
    refused((*plain, "--out", tmp_path), "is a folder")
    refused((*plain, "--out", tmp_path / "none/f.jsonl"), "cannot be written")
    refused((*plain, "--nll"), "there is no option --nll")


def test_data_that_cannot_be_scored(refused, project, tmp_path):
    def data(*rows: Any) -> tuple[Any, ...]:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return "--model", project.model, "--data", file

    question = {"role": "user", "content": "a" * 60}
    refused(data({"messages": [question]}), "rows.jsonl, row 1", "nothing in it would be trained")
    answer = {"role": "assistant", "content": "b"}
    refused((*data({"messages": [question, answer]}), "--max-length", 48), "at --max-length 48", "raise it")
    refused(
        (*data({"text": "abc"}), "--generate", 1, "--max-new-tokens", 4),
        "--generate",
        "plain text",
        "set --generate=0",
    )
    refused((*data({"text": "abc"}), "--with-base"), "--with-base goes with an adapter")
