"""A tokenizer, data and a config made on the spot, and the command called in this process."""

import json
import os
import sys

import jax
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from jaxlora import plan
from jaxlora.core import cli
from jaxlora.data.chat import ChatEncoder, load_tokenizer

CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
SETTINGS = {
    "data.max_length": 64,
    "optim.warmup_steps": 2,
    "train.batch_size": 4,
    "train.micro_batch_size": 4,
    "eval.batch_size": 4,
}


def talk(*contents, system=None):
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + turns}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_config(path, settings):
    lines = [f"    config.{key} = {value!r}\n" for key, value in settings.items()]
    path.write_text(
        "from jaxlora.config.load import base_config\n\n\ndef get_config():\n    config = base_config()\n"
        + "".join(lines)
        + "    return config\n"
    )
    return path


ROWS = [talk(f"say {i}", "n" * (i % 7 + 1), f"and {i}", "m" * (i % 3 + 1)) for i in range(40)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder of a tokenizer alone (one id a byte), data and a config."""
    folder = tmp_path_factory.mktemp("project")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: id for id, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    (folder / "model").mkdir()
    backend.save(str(folder / "model/tokenizer.json"))
    declared = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHATML,
        "eos_token": "<|im_end|>",
    }
    (folder / "model/tokenizer_config.json").write_text(json.dumps(declared))
    write_rows(folder / "train.jsonl", ROWS)
    write_rows(folder / "eval.jsonl", ROWS[:10])
    named = {"model.path": str(folder / "model"), "data.train": str(folder / "train.jsonl")}
    write_config(folder / "tiny.py", {**named, "data.eval": str(folder / "eval.jsonl"), **SETTINGS})
    return folder


@pytest.fixture
def call(folder, capfd, monkeypatch):
    """call("--rows", "2", key=value) -> (exit code, stdout, stderr) of the command, run in this process; of its part
    "data", unless it is told another."""

    def call(*words, **changed):
        jax.devices()  # or JAX would start with what the command sets for a process of its own
        for name in ("XLA_FLAGS", "JAX_PLATFORMS"):
            monkeypatch.setenv(name, os.environ[name])
        flags = [f"--config.{key.replace('__', '.')}={value}" for key, value in changed.items()]
        only = [] if "--only" in words else ["--only", "data"]
        arguments = ["--config", str(folder / "tiny.py"), *only, *map(str, words), *flags]
        monkeypatch.setattr(sys, "argv", ["jaxlora.plan", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.run(plan.main)
        return left.value.code, *capfd.readouterr()

    return call


@pytest.fixture(scope="session")
def encoder(folder):
    return ChatEncoder(load_tokenizer(str(folder / "model")))


@pytest.fixture(scope="session", name="talk")
def _talk():
    """talk("question", "answer", ..., system="...") -> a row of messages."""
    return talk


@pytest.fixture(scope="session", name="write_rows")
def _write_rows():
    """write_rows(path, rows) -> the path."""
    return write_rows


@pytest.fixture(scope="session")
def conversations():
    """The 40 rows of data.train; data.eval are the first 10."""
    return ROWS
