"""What the plan says that the data and the schedule come to, and how it answers wrong input."""

import json
import math
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxlora.config.build.dataplan import decay_budget, smoothing_floor
from jaxlora.config.schema import OptimConfig
from jaxlora.data.batches import prepare
from jaxlora.data.sources import load_conversations
from jaxlora.training.optimizer import OptimizerSettings
from jaxlora.training.optimizer import decay_budget as decay_budget_of_training


def test_the_summary(call, encoder, folder, tmp_path):
    code, out, _ = call("--rows", 1, optim__label_smoothing=0.1, optim__weight_decay=0.5)
    assert code == 0
    train = prepare(load_conversations(str(folder / "train.jsonl")), encoder, 64, cache=tmp_path)
    cells = {line.split("  ")[1].strip(): line.split() for line in out.splitlines() if line.startswith("  ")}
    assert f"data.train: {folder}/train.jsonl: 40 rows of messages" in out
    assert f"data.eval: {folder}/eval.jsonl: 10 rows of messages" in out
    assert cells["conversations"][1:] == ["40", "10"]
    assert cells["cut at data.max_length"][-2] == f"{train.truncated}"
    assert cells["tokens"][1] == f"{train.tokens:,}"
    assert cells["trained tokens"][2:4] == [
        f"{train.trained_tokens:,}",
        f"({train.trained_tokens / train.tokens:.1%})",
    ]
    assert cells["longest"][1] == f"{train.lengths.max() + 1}"
    assert "0.1 over 259 words (of the tokenizer): the objective cannot fall below 0.877 nats" in out
    assert "2 (alpha 32 / rank 16)" in out
    assert "training would refuse" not in out


def test_what_differs_by_module_or_matrix(call):
    code, out, _ = call(
        lora__rank_pattern="('down_proj=4','*attn*=8')", optim__loraplus_lr_ratio=16,
        optim__weight_decay=0.5, optim__learning_rate=1e-2, train__max_steps=100, lora__scaling="rslora",
    )  # fmt: skip
    assert code == 0
    assert "8 (alpha 32 / sqrt(rank 16): gate_proj, up_proj); 16 (alpha 32 / sqrt(rank 4): down_proj)" in out
    # The sum of the rates is 0.01 x (1/2 + 99/2): shrunk by 1 - exp(-0.25), and B by 1 - exp(-4).
    assert "0.5: shrinks a weight by 22% (B by 98%) over the run" in out


def test_the_held_out_part(call):
    code, out, _ = call(data__eval="", data__eval_fraction=0.25)
    assert code == 0
    assert "held out: data.eval_fraction 0.25 of data.train" in out
    assert re.search(r"^  conversations +30 +10$", out, re.M)


def test_a_config_that_training_would_refuse_still_shows_its_rows(
    call, folder, write_rows, conversations, tmp_path
):
    code, out, _ = call("--rows", 1, optim__warmup_steps=1000)
    assert code == 0
    assert out.count("turns") == 1
    assert "training would refuse this: optim.warmup_steps = 1000, but the run has" in out
    model = shutil.copytree(folder / "model", tmp_path / "model")
    # A config of a decoder that jaxlora does not compute: its numbers are read, and nothing else.
    known = {"model_type": "qwen2", "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    (model / "config.json").write_text(
        json.dumps({**known, "vocab_size": 1000, "max_position_embeddings": 32})
    )
    code, out, _ = call("--rows", 1, model__path=model, optim__label_smoothing=0.1)
    assert code == 0
    assert "training would refuse this: data.max_length = 64, but" in out
    assert "0.1 over 1,000 words (of config.json)" in out
    one = write_rows(tmp_path / "one.jsonl", conversations[:1])
    code, out, _ = call("--rows-file", tmp_path / "rows.jsonl", data__train=one, data__eval="")
    assert code == 0
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 1
    assert "training would refuse this: data.eval_fraction 0.02 of 1 rows leaves nothing" in out


@pytest.mark.parametrize(
    ("steps", "warmup", "final", "decay", "rate"),
    [(1, 0, 0.0, 0.1, 2e-4), (100, 10, 0.0, 0.1, 2e-4), (333, 1, 0.1, 3.0, 1e-2), (3000, 100, 0.5, 0.0, 1.0)],
)
def test_the_decay_budget_is_that_of_training(steps, warmup, final, decay, rate):
    chosen = OptimConfig(learning_rate=rate, warmup_steps=warmup, final_fraction=final, weight_decay=decay)
    settings = OptimizerSettings(rate, warmup, steps, final, decay, 0.9, 0.999, 1e-8, math.inf)
    # float32 sums, and 1 - exp of them: good to a few rounding errors of 1
    assert decay_budget(chosen, steps) == pytest.approx(
        decay_budget_of_training(settings), rel=1e-5, abs=3e-7
    )


@pytest.mark.parametrize(("smoothing", "vocabulary"), [(0.1, 151_936), (0.5, 7), (1e-3, 264)])
def test_no_prediction_beats_the_smoothing_floor(smoothing, vocabulary):
    target = np.full(vocabulary, smoothing / vocabulary)
    target[3] += 1 - smoothing
    floor = smoothing_floor(smoothing, vocabulary)
    assert floor == pytest.approx(-np.sum(target * np.log(target)), rel=1e-12)
    other = (1 - 1e-3) * target + 1e-3 / vocabulary
    assert -np.sum(target * np.log(other)) > floor
    assert smoothing_floor(0.1, 151_936) == pytest.approx(1.52, abs=0.005)


# ---- wrong input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "0"], "--rows 0 must be at least 1"),
        (["--rows", "-3"], "--rows -3 must be at least 1"),
        (["--rows", "few"], "invalid int value: 'few'"),
        (["--only", "memory"], "--only memory: there is no such part; known: data"),
        (["--only", "dat"], "did you mean data?"),
        (["--row", "2"], "there is no option --row: did you mean --rows?"),
        (["--config.optim.learning_rat=1"], "optim.learning_rate"),
        (["--config.model.path=./nowhere"], "./nowhere is no folder; model.path takes"),
        (["--config.model.path=example/not-cached"], "the tokenizer of example/not-cached cannot be loaded"),
        (["--config.data.train=./nowhere.jsonl"], "./nowhere.jsonl does not exist"),
        (["--config.data.eval=./nowhere.jsonl"], "./nowhere.jsonl does not exist"),
        (["--rows-file", "no/such/rows.jsonl"], "there is no folder no/such; make it first"),
        (["--rows-file", "."], "--rows-file . is not a file"),
        (["--rows-file", "x" * 300], "cannot be written (File name too long)"),
        (["--rows-file", "DATA"], "is the data itself"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_wrong_input_is_answered_in_a_line_or_two(arguments, message, call, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(*(str(folder / "train.jsonl") if word == "DATA" else word for word in arguments))
    assert code == 2
    error = err[err.index("error: ") :]
    assert message in error
    assert len(error.splitlines()) <= 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        (["user"], "nothing in it would be trained"),
        (["assistant"], "the conversation starts with the assistant"),
        (["user", "user", "assistant"], "two user turns in a row"),
    ],
)
@pytest.mark.parametrize("place", [2, 40], ids=["shown", "not shown"])
def test_a_row_that_cannot_be_trained_on(roles, reason, place, call, write_rows, conversations, tmp_path):
    """Whether it is among the rows that are shown or not; a file of rows is written whole or not at all."""
    rows = list(conversations)
    rows[place - 1] = {"messages": [{"role": role, "content": "text"} for role in roles]}
    file = write_rows(tmp_path / "bad.jsonl", rows)
    code, _, err = call("--rows", 3, "--rows-file", tmp_path / "rows.jsonl", data__train=file)
    assert code == 2
    assert f"{file}, row {place}: " in err
    assert reason in err
    assert (tmp_path / "rows.jsonl").exists() == (place == 40)
    assert not list(tmp_path.glob("*.partial"))


def test_a_file_of_before_stays_when_the_rows_cannot_be_made(call, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("precious")
    assert call("--rows-file", file, data__train="./nowhere.jsonl")[0] == 2
    assert file.read_text() == "precious"
    assert call("--rows-file", file)[0] == 0
    assert len(file.read_text().splitlines()) == 40


def test_no_device_is_started(folder, repository):
    """A laptop has none, and on a TPU a run may hold it."""
    program = (
        "import sys\nfrom jaxlora import plan\nfrom jax._src import xla_bridge\n"
        f"plan.main(['--config', {str(folder / 'tiny.py')!r}, '--only', 'data'])\n"
        "assert not xla_bridge._backends, xla_bridge._backends\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=repository, check=True, stdout=subprocess.DEVNULL)


def test_help_comes_at_once(repository):
    """Best of three, so that a busy machine does not count."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        command = [sys.executable, "-m", "jaxlora.plan", "--help"]
        ended = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - started)
        assert "--rows-file" in ended.stdout
    assert min(seconds) < 1.5
