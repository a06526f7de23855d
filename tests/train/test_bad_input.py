"""Whatever a person gives wrong is answered in a line or two, with exit code 2, and leaves nothing behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlora.config.load import load_config
from jaxlora.config.schema import to_dict
from jaxlora.lora.peft import save_peft
from jaxlora.lora.spec import LoraSpec
from jaxlora.runs.directory import RunDirectory

GOOD = {"messages": [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "def"}]}


@pytest.fixture
def refused(project, call, tmp_path, monkeypatch) -> Callable[..., str]:
    """refused("a word", ..., key=value) runs the command, and returns its message after checking its form."""
    monkeypatch.chdir(tmp_path)

    def refused(*words: Any, **changed: Any) -> str:
        before = contents(tmp_path)
        ended = call(project.arguments("made/by/mistake", **changed))
        assert ended.code == 2, ended
        assert ended.err.startswith("error: "), ended.err
        assert len(ended.err.splitlines()) <= 3, ended.err
        assert "Traceback" not in ended.out + ended.err
        assert contents(tmp_path) == before
        missing = [str(word) for word in words if str(word) not in ended.err]
        assert not missing, f"{missing} not in: {ended.err}"
        return ended.err

    return refused


def contents(folder: Path) -> dict[str, bytes]:
    """Every file and folder below, but for the lock, which stays with the number of its last holder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"a folder"
        for path in sorted(folder.rglob("*"))
        if path.name != ".lock"
    }


@pytest.fixture
def model(project, tmp_path) -> Path:
    """A copy of the base, to be spoilt."""
    return Path(shutil.copytree(project.model, tmp_path / "spoilt"))


@pytest.fixture
def data(tmp_path) -> Callable[..., Path]:
    """data("line", ...) -> a jsonl file of these lines; what is no text is written as JSON."""

    def write(*lines: Any) -> Path:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
        return file

    return write


# ---- the config ---------------------------------------------------------------------------------------------------


def test_missing_config(call):
    ended = call(["--config", "configs/qwen5b.py"])
    assert ended.code == 2
    assert ended.err == "error: there is no config configs/qwen5b.py.\nDid you mean configs/qwen05b.py?\n"


def test_no_arguments(call):
    ended = call([])
    assert ended.code == 2
    assert "--config" in ended.err
    assert len(ended.err.splitlines()) <= 3


def test_unknown_key(refused):
    refused("optim.learning_rat", "optim.learning_rate", optim__learning_rat=1e-3)


def test_wrong_type(refused):
    refused("train.batch_size", "'many'", "integer", train__batch_size="many")


def test_quantisation(refused, project, call, tmp_path, devices):
    refused("model.quantize", "'int4'", "'none'", "'int8'", "'nf4'", model__quantize="int4")
    refused("model.quantize_embeddings", "'fp4'", "'int8'", "'nf4'", model__quantize_embeddings="fp4")
    devices(2)  # the base has 32 inputs, which are one block
    refused(
        "mesh.fsdp = 2 does not divide embed_tokens/embedding",
        "(its 32 in blocks of 32); mesh.fsdp may be 1.",
        model__quantize_embeddings="int8",
        mesh__data=1,
        mesh__fsdp=2,
    )
    refused(
        "mesh.fsdp = 2 does not divide",
        "(its 32 in blocks of 32); mesh.fsdp may be 1.",
        model__quantize="nf4",
        mesh__data=1,
        mesh__fsdp=2,
    )


def test_impossible_value(refused):
    refused("optim.learning_rate", "-1", "--config.optim.learning_rate=", optim__learning_rate=-1)


def test_batch_not_divisible_by_micro_batch(refused):
    refused("train.batch_size = 8", "train.micro_batch_size = 3", "2 or 4", train__micro_batch_size=3)


def test_warmup_as_long_as_the_run(refused):
    """From the epochs, so that only the data tells: 60 examples are 30 rows are 4 steps an epoch."""
    refused(
        "optim.warmup_steps = 8", "8 steps", "2 epochs of 4", "--config.optim.warmup_steps=",
        train__max_steps=0, train__epochs=2, optim__warmup_steps=8,
    )  # fmt: skip


# ---- the model ----------------------------------------------------------------------------------------------------


def test_model_missing(refused):
    refused("./nowhere", "does not exist", "folder", "hub id", model__path="./nowhere")


def test_model_without_config(refused, model):
    (model / "config.json").unlink()
    refused(model, "config.json", model__path=model)


def test_model_without_weights(refused, model):
    (model / "model.safetensors").unlink()
    refused(model, "safetensors", model__path=model)


def test_model_without_tokenizer(refused, model):
    (model / "tokenizer.json").unlink()
    refused(model, "tokenizer.json", "copy", model__path=model)


def test_missing_and_extra_tensors(refused, model):
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.gate_proj.bias"] = np.zeros(64, np.float32)
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, file)
    refused(
        "missing", "model.layers.0.self_attn.q_proj.weight", "unexpected", "model.layers.1.mlp.gate_proj.bias",
        model__path=model,
    )  # fmt: skip


def test_misshapen_tensor(refused, model):
    file = model / "model.safetensors"
    save_file(load_file(file) | {"model.norm.weight": np.ones(31, np.float32)}, file)
    refused("model.norm.weight", "31", "32", model__path=model)


def test_weights_cut_short(refused, model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    refused(file, model__path=model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, ["gpt2", "qwen2", "mistral"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["rope", "yarn"]),
    ],
)
def test_unsupported_architecture(refused, model, change, words):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | change))
    refused(*words, model__path=model)


def test_model_id_not_cached_without_network(refused):
    refused("example/not-a-cached-model", "network", "folder", model__path="example/not-a-cached-model")


def test_max_length_over_the_models(refused):
    refused("data.max_length = 65", "64", "--config.data.max_length=64", data__max_length=65)


def test_adapter_of_another_rank(refused, project, tmp_path):
    pair = {"a": np.zeros((2, 32, 2), np.float32), "b": np.zeros((2, 2, 32), np.float32)}
    spec = LoraSpec(rank=2, targets=("q_proj",))
    adapter = {"layers": {"self_attn": {"q_proj": pair}}}
    save_peft(tmp_path / "adapter", adapter, spec, str(project.model), "")
    refused("lora.init_from", "rank 2", "4", "--config.lora.rank=2", lora__init_from=tmp_path / "adapter")


def test_adapter_of_another_scale(refused, project, tmp_path):
    pair = {"a": np.zeros((2, 32, 4), np.float32), "b": np.zeros((2, 4, 32), np.float32)}
    spec = LoraSpec(rank=4, alpha=16.0, targets=("q_proj",))
    save_peft(tmp_path / "a", {"layers": {"self_attn": {"q_proj": pair}}}, spec, str(project.model), "")
    refused(
        "lora.init_from", "alpha 16", "asks for 8", "--config.lora.alpha=16",
        lora__init_from=tmp_path / "a", lora__targets="q_proj",
    )  # fmt: skip
    refused(
        "lora.init_from",
        "lora.init = 'pissa'",
        "leave one",
        lora__init_from=tmp_path / "a",
        lora__init="pissa",
    )


def test_pissa_of_a_rank_that_a_matrix_does_not_have(refused):
    refused(
        "pissa with rank 17", "k_proj [32, 16]", "--config.lora.rank=16", lora__init="pissa", lora__rank=17
    )


def test_ranks_of_modules_that_are_not_there(refused):
    refused("'lm_head=4'", "none of the adapted modules", "mlp.down_proj", lora__rank_pattern="lm_head=4")
    refused("'q_proj=0'", "positive integer", lora__rank_pattern="q_proj=0")
    refused("lora.init", "'pizza'", "'pissa_niter_N'", lora__init="pizza")


def test_adapter_missing(refused):
    refused("adapter folder nowhere", "does not exist", lora__init_from="./nowhere")


# ---- the data -----------------------------------------------------------------------------------------------------


def test_data_missing(refused):
    refused("./nowhere.jsonl", "does not exist", "hub id", data__train="./nowhere.jsonl")


def test_eval_data_missing(refused):
    refused("./nowhere.jsonl", "does not exist", data__eval="./nowhere.jsonl")


def test_data_empty(refused, data):
    refused(data(), "empty", "at least one conversation", data__train=data())


def test_data_malformed_at_a_line(refused, data):
    file = data(GOOD, GOOD, '{"messages": [{"role"', GOOD)
    refused(file, "line 3", "JSON", data__train=file)


def test_data_of_unknown_columns(refused, data):
    file = data({"question": "a", "solution": "b"})
    refused(
        file, "question, solution", "messages", "prompt, completion", "instruction, output", data__train=file
    )


def test_row_without_a_trained_token(refused, data):
    file = data(GOOD, {"messages": GOOD["messages"][:1]})
    refused(f"{file}, row 2", "assistant", data__train=file)


def test_unknown_role(refused, data):
    file = data(GOOD, {"messages": [{"role": "narrator", "content": "x"}, GOOD["messages"][1]]})
    refused(f"{file}, row 2", '"narrator"', "system, user, assistant", data__train=file)


def test_all_rows_cut_before_their_answer(refused, data):
    file = data({"messages": [{"role": "user", "content": "a" * 60}, {"role": "assistant", "content": "b"}]})
    refused(file, "data.max_length 48", "raise it", data__train=file)


def test_eval_data_without_a_single_trained_token(refused, data):
    too_long = {
        "messages": [{"role": "user", "content": "abc" * 40}, {"role": "assistant", "content": "def"}]
    }
    refused("eval", "loses all its trained tokens at data.max_length 48", data__eval=data(too_long))


def test_best_by_a_group_that_the_data_does_not_have(refused):
    told = refused(
        "checkpoint.best_by = 'eval_by_turn/later/nll' is not computed",
        checkpoint__best_by="eval_by_turn/later/nll",
    )
    assert "besides eval/NAME, train_eval/nll" in told
    refused(
        "stop.by = 'eval_by_source/x/ece'",
        "no others",
        stop__by="eval_by_source/x/ece",
        eval__train_examples=0,
    )


def test_data_id_not_cached_without_network(refused):
    refused("example/not-a-cached-set", "network", "local file", data__train="example/not-a-cached-set")


# ---- the devices --------------------------------------------------------------------------------------------------


def test_batch_not_divisible_by_the_mesh(refused, devices):
    devices(8)
    refused(
        "train.micro_batch_size = 4", "8 devices", "--config.train.micro_batch_size=8",
        train__micro_batch_size=4,
    )  # fmt: skip


def test_mesh_larger_than_the_devices(refused, devices):
    devices(8)
    refused("mesh.data = 3", "8 devices", "mesh.data = -1", mesh__data=3)


def test_mesh_that_does_not_divide_the_parameters(refused, devices):
    devices(3)
    refused("mesh.tensor = 3", "32", mesh__data=1, mesh__tensor=3)


# ---- the workdir --------------------------------------------------------------------------------------------------


@pytest.fixture
def begun(project, tmp_path, monkeypatch) -> Path:
    """A run that was begun and left, in the folder that the command is told to use."""
    monkeypatch.chdir(tmp_path)
    path = Path("made/by/mistake")
    with RunDirectory.open(path, to_dict(load_config(str(project.config)))) as run:
        run.update_record(status="preempted", steps=0)
        run.append_metrics(0, {"eval/nll": 3.0})
    return path


def test_workdir_of_another_config(refused, begun):
    refused(
        begun, "another config", "optim.learning_rate is 0.01 there and 0.001 here", "--workdir",
        optim__learning_rate=1e-3,
    )  # fmt: skip


def test_workdir_that_is_no_run(refused, tmp_path):
    (tmp_path / "made/by/mistake").mkdir(parents=True)
    (tmp_path / "made/by/mistake/thesis.tex").write_text("all I have")
    refused("made/by/mistake", "thesis.tex", "--workdir")


def test_workdir_in_use(refused, project, begun):
    with RunDirectory.open(begun, to_dict(load_config(str(project.config)))):
        refused(begun, "in use", "--workdir")


def test_a_refused_start_leaves_a_begun_run_as_it_was(refused, project, begun):
    """The run's own command, but its data has gone meanwhile."""
    hidden = project.folder / "hidden.jsonl"
    (project.folder / "train.jsonl").rename(hidden)
    try:
        refused("train.jsonl", "does not exist")
    finally:
        hidden.rename(project.folder / "train.jsonl")


def test_data_that_changed_since_the_run_began(refused, project, begun):
    """A resumed run must not see other data than it began with."""
    old = {"fingerprint": "another", "examples": 60, "tokens": 1, "trained_tokens": 1}
    with RunDirectory.open(begun, to_dict(load_config(str(project.config)))) as run:
        run.update_record(data={"train": old, "eval": old})
    refused(begun, "other data", "data.train and data.eval", "--workdir")
