"""A model, a tokenizer and data made on the spot, small enough to fine-tune by the whole command within seconds."""

import collections
import contextlib
import io
import json
import re
import string
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from jaxlora import train
from jaxlora.config.build import inputs
from jaxlora.core import cli

MODEL = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
COMPILED = "/jax/core/compile/backend_compile_duration"
SETTINGS = {
    "model.dtype": "float32",
    "model.remat": "none",
    "lora.rank": 4,
    "lora.alpha": 8.0,
    "data.max_length": 48,
    "optim.learning_rate": 1e-2,
    "optim.warmup_steps": 2,
    "train.batch_size": 8,
    "train.micro_batch_size": 8,
    "train.max_steps": 6,
    "eval.every": 3,
    "eval.batch_size": 8,
    "checkpoint.every": 3,
    "log.every": 1,
}

RUNS: dict[str, dict[str, Any]] = {
    # A rate that rises for so long that the best step, 4, is not the last, 8.
    "plain": {
        "optim__learning_rate": 0.2,
        "optim__warmup_steps": 7,
        "train__max_steps": 8,
        "eval__every": 2,
        "eval__generate": 5,
        "eval__max_new_tokens": 4,
        "checkpoint__every": 2,
    },
    "held out": {
        "model__dtype": "bfloat16",
        "data__eval": "",
        "data__eval_fraction": 0.3,
        "data__packing": False,
        "data__train_on": "all",
        "eval__max_examples": 7,
        "eval__metrics": "nll,token_accuracy",
        "lora__scaling": "rslora",
        "lora__targets": "q_proj",
        "seed": 3,
    },
    "variants": {"lora__use_dora": True, "lora__init": "pissa", "lora__targets": "q_proj,down_proj"},
    "ranks": {
        "lora__rank_pattern": "q_proj=7,mlp.*=2",
        "lora__scaling": "rslora",
        "lora__targets": "q_proj,down_proj,k_proj",
    },
    # Saved at no other step than those of its three best evaluations, which take more memory than there is.
    "few": {
        "train__max_steps": 8,
        "eval__every": 2,
        "eval__batch_size": 64,
        "mesh__memory_gb": 0.0052,
        "checkpoint__every": 100,
        "checkpoint__keep": 1,
        "checkpoint__best": 3,
    },
    "cut": {"mesh__data": 1, "mesh__fsdp": 8, "lora__targets": "q_proj"},
    "nf4": {"model__quantize": "nf4", "eval__generate": 5, "eval__max_new_tokens": 4},
    "tables": {"model__quantize_embeddings": "nf4", "eval__generate": 5, "eval__max_new_tokens": 4},
}
"""Runs that other commands are pointed at: what each changes in `SETTINGS`."""


class Ended(NamedTuple):
    """How a command ended: its exit code, and what it printed."""

    code: int
    out: str
    err: str


class Project(NamedTuple):
    """A folder with a base, data and a config.

    Attributes:
        folder: of everything.
        model: the base's folder.
        config: path of the config file.
    """

    folder: Path
    model: Path
    config: Path

    def arguments(self, workdir: Path | str, **changed: Any) -> list[str]:
        """What is typed after `python -m jaxlora.train`; keys are written with two underscores for the dot."""
        flags = [f"--config.{key.replace('__', '.')}={value}" for key, value in changed.items()]
        return ["--config", str(self.config), *flags, "--workdir", str(workdir)]


def write_model(folder: Path, config: dict[str, Any] = MODEL, seed: int = 0) -> Path:
    """A model folder as Hugging Face has it: config, random float32 weights, byte-level tokenizer with ChatML."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    width, wide = config["hidden_size"], config["intermediate_size"]
    keys = width // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "model.norm.weight": (width,),
    }
    for layer in range(config["num_hidden_layers"]):
        outputs = {"q_proj": width, "k_proj": keys, "v_proj": keys}
        block = {f"self_attn.{name}.weight": (size, width) for name, size in outputs.items()}
        block |= {f"self_attn.{name}.bias": (size,) for name, size in outputs.items()}
        block |= {
            "self_attn.o_proj.weight": (width, width),
            "mlp.gate_proj.weight": (wide, width),
            "mlp.up_proj.weight": (wide, width),
            "mlp.down_proj.weight": (width, wide),
            "input_layernorm.weight": (width,),
            "post_attention_layernorm.weight": (width,),
        }
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    draw = np.random.default_rng(seed)
    tensors = {
        name: np.ones(shape, np.float32)
        if "norm" in name
        else 0.2 * draw.standard_normal(shape, dtype=np.float32)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: id for id, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.save(str(folder / "tokenizer.json"))
    declared = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHATML,
        "eos_token": "<|im_end|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({**declared, "pad_token": "<|endoftext|>"}))
    return folder


def write_rows(path: Path, rows: list[Any]) -> Path:
    """Rows as jsonl."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def talk(question: str, answer: str) -> dict[str, Any]:
    """A row of messages."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def conversations(start: int, count: int) -> list[dict[str, Any]]:
    """Letters to be answered by the letters after them: something that a few steps visibly improve."""
    letters = string.ascii_lowercase * 2
    return [
        talk(letters[i % 26 : i % 26 + 1 + i % 3], letters[i % 26 + 1 : i % 26 + 2 + i % 3])
        for i in range(start, start + count)
    ]


def write_config(path: Path, **settings: Any) -> Path:
    """A config file that sets these keys, dots and all."""
    lines = [f"    config.{key} = {value!r}" for key, value in settings.items()]
    body = [
        "from jaxlora.config.load import base_config",
        "",
        "",
        "def get_config():",
        "    config = base_config()",
    ]
    path.write_text("\n".join([*body, *lines, "    return config", ""]))
    return path


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Project:
    """Made once; nobody changes it."""
    folder = tmp_path_factory.mktemp("project")
    model = write_model(folder / "model")
    train_rows = write_rows(folder / "train.jsonl", conversations(0, 60))
    eval_rows = write_rows(folder / "eval.jsonl", conversations(60, 20))
    named = {"model.path": str(model), "data.train": str(train_rows), "data.eval": str(eval_rows)}
    return Project(folder, model, write_config(folder / "tiny.py", **named, **SETTINGS))


@pytest.fixture(scope="session")
def run(project, tmp_path_factory) -> Callable[[str], Path]:
    """run(name) -> the folder of one of `RUNS`, trained when it is first asked for."""
    found: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in found:
            workdir = tmp_path_factory.mktemp("runs") / name.replace(" ", "-")
            devices = jax.local_devices()[: RUNS[name].get("mesh__fsdp", 1)]
            with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
                patch.setattr(jax, "devices", lambda *_: devices)
                patch.setattr(sys, "argv", ["jaxlora.train", *project.arguments(workdir, **RUNS[name])])
                with pytest.raises(SystemExit) as left:
                    cli.run(train.main)
            assert left.value.code == 0
            found[name] = workdir
        return found[name]

    return run


@pytest.fixture
def call(capfd, monkeypatch) -> Callable[..., Ended]:
    """call(arguments) runs the command in this process, as `python -m jaxlora.train` would, or another command."""

    def call(arguments: list[str], command: ModuleType = train) -> Ended:
        monkeypatch.setattr(sys, "argv", [command.__name__, *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.run(command.main)
        return Ended(left.value.code, *capfd.readouterr())  # type: ignore[arg-type]

    return call


@pytest.fixture
def counted() -> Iterator[collections.Counter[str]]:
    """How often JAX compiled something, or looked into its cache, by the event's or the program's name."""
    events: collections.Counter[str] = collections.Counter()

    def count(name: str, *_: Any, fun_name: str = "", **__: Any) -> None:
        events[name] += 1
        if name == COMPILED:
            events[re.sub(r"^jit[_(]|\)$", "", fun_name)] += 1  # "jit(step)" or "jit_step", by JAX's version

    jax.monitoring.register_event_listener(count)
    jax.monitoring.register_event_duration_secs_listener(count)
    yield events
    jax.monitoring.unregister_event_listener(count)
    jax.monitoring.unregister_event_duration_listener(count)


@pytest.fixture(autouse=True)
def devices(monkeypatch) -> Iterator[Callable[[int], None]]:
    """Commands see one device, or as many as `devices(n)` says."""
    every = jax.devices()

    def see(count: int) -> None:
        monkeypatch.setattr(jax, "devices", lambda *_: every[:count])

    see(1)
    return see


@pytest.fixture
def told(monkeypatch) -> list[int]:
    """The most examples of a row that attention is told of, each time that it is."""
    found: list[int] = []

    def told(how: Any, device: Any, examples: int) -> Any:
        found.append(examples)
        return how

    monkeypatch.setattr(inputs, "told", told)
    return found
