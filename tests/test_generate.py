"""The generate command as a person meets it: a prompt, lines of a file, a chat, and what it says to wrong input."""

import io
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from jaxlora import generate
from jaxlora.config.schema import Config, to_dict
from jaxlora.core import cli
from jaxlora.core.errors import InputError
from jaxlora.lora.peft import save_peft
from jaxlora.lora.spec import LoraSpec
from jaxlora.models.spec import DecoderSpec
from jaxlora.models.weights import tensor_table
from jaxlora.runs.directory import RunDirectory

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 200,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ADAPTER = LoraSpec(rank=2, alpha=4.0, targets=("q_proj", "down_proj"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model that writes letters: byte-level ids, the others made unlikely."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    draw = np.random.default_rng(0)
    tensors = {
        name: (draw.normal(size=stored.stored_shape) * 0.3 + ("norm" in name)).astype(np.float32)
        for stored in tensor_table(DecoderSpec.from_hf(CONFIG)).values()
        for name in stored.names
    }
    save_file(tensors, folder / "model.safetensors")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def adapter():
    shapes = {("self_attn", "q_proj"): (32, 32), ("mlp", "down_proj"): (48, 32)}
    draw = np.random.default_rng(1)
    tree = {"self_attn": {}, "mlp": {}}
    for (block, name), (fan_in, fan_out) in shapes.items():
        a, b = draw.normal(size=(2, fan_in, 2)), draw.normal(size=(2, 2, fan_out))
        tree[block][name] = {"a": a.astype(np.float32), "b": b.astype(np.float32)}
    return {"layers": tree}


@pytest.fixture(scope="module")
def run(model, adapter, tmp_path_factory):
    """The folder of a run that has had an evaluation, and goes on."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    config = Config.from_dict(
        {"model": {"path": str(model), "dtype": "float32"}, "data": {"train": "data.jsonl"}}
    )
    with RunDirectory.open(folder, to_dict(config)) as opened:
        opened.update_record(status="running", steps=7, best={"step": 5, "eval/nll": 1.25})
    save_peft(folder / "best", adapter, ADAPTER, str(model))
    return folder


@pytest.fixture
def ask(capsys):
    """Runs the command; gives exit code, standard output and standard error."""

    def ask(*arguments):
        capsys.readouterr()
        before = sys.argv
        sys.argv = ["generate", *map(str, arguments)]
        try:
            with pytest.raises(SystemExit) as ended:
                cli.run(generate.main)
        finally:
            sys.argv = before
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return ask


def test_a_run_answers_with_its_adapter(ask, run, model):
    code, answer, told = ask("--run", run, "--prompt", "abc", "--max-new-tokens", 12)
    assert code == 0
    assert answer.endswith("\n")
    assert "toy/best, step 5, eval nll 1.2500" in told
    assert "tokens/s" in told
    base = "--model", model, "--dtype", "float32", "--prompt", "abc", "--max-new-tokens", 12
    assert ask(*base, "--adapter", run / "best")[1] == answer
    assert ask(*base)[1] != answer


def test_the_seed_and_the_temperature_decide(ask, run):
    hot = "--run", run, "--prompt", "abc", "--max-new-tokens", 30, "--temperature", 3, "--top-p", 1
    first, again, other = (ask(*hot, "--seed", seed)[1] for seed in (0, 0, 1))
    assert first == again != other


def test_each_line_of_the_input_is_a_prompt(ask, run, monkeypatch):
    def lines(data):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        return ask("--run", run, "--max-new-tokens", 5)

    code, out, told = lines("abc\n\nzwölf\n".encode())
    assert code == 0
    alone = [ask("--run", run, "--max-new-tokens", 5, "--prompt", prompt)[1] for prompt in ("abc", "zwölf")]
    assert out == "".join(alone)
    assert told.count("tokens/s") == 1

    code, _, told = lines(b"abc\n\xff\xfe\n")
    assert (code, told.splitlines()[-1]) == (
        2,
        "error: line 2 of the input is not UTF-8 text.",
    )
    code, _, told = lines(b"\n")
    assert (code, told.splitlines()[-1][:32]) == (2, "error: the input holds no prompt")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def chat(ask, monkeypatch, run, *typed, options=()):
    """Types lines into a chat; an exception among them is raised where the line would be read."""
    lines = iter([*typed, EOFError()])

    def read(prompt=""):
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", read)
    return ask("--run", run, *options)


def test_a_chat_remembers_until_it_is_reset(ask, run, monkeypatch):
    few = "--max-new-tokens", 6
    code, out, told = chat(
        ask, monkeypatch, run, "abc", "", "abc", "/what", KeyboardInterrupt(), "/reset", "abc", "/quit", "abc",
        options=few,
    )  # fmt: skip
    assert code == 0
    alone = ask("--run", run, "--prompt", "abc", *few)[1]
    assert out.startswith(alone)
    assert out.endswith(alone)
    assert len(out) > 2 * len(alone)
    assert told.count("tokens/s") == 3
    assert "/what is no command" in told
    assert "a new conversation" in told
    assert "/quit or Ctrl-D leaves" in told


def test_a_chat_says_when_the_context_is_full(ask, run, monkeypatch):
    """200 positions hold a prompt of 23 tokens, and after its answer nothing more."""
    code, _, told = chat(ask, monkeypatch, run, "abc", "def", "/reset", "x" * 500, "ghi")
    assert code == 0
    assert "cut: the context is full" in told
    assert "200 of 200 tokens are used: go on with /reset" in told
    assert "error: the prompt has" in told
    # only the two that fitted were answered
    assert told.count("tokens/s") == 2


def test_an_answer_can_be_interrupted_and_the_chat_goes_on(ask, run, monkeypatch):
    """Ctrl-C arrives with the third piece that is written."""
    import signal

    from jaxlora.data.detokenizer import Detokenizer

    push, pieces = Detokenizer.push, []

    def interrupt(self, token):
        pieces.append(token)
        if len(pieces) == 3:
            signal.raise_signal(signal.SIGINT)
        return push(self, token)

    monkeypatch.setattr(Detokenizer, "push", interrupt)
    code, _, told = chat(ask, monkeypatch, run, "abc", "def", options=("--max-new-tokens", 9))
    assert code == 0
    assert "[3 tokens" in told
    assert "interrupted]" in told
    assert "[9 tokens" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x"], "name what is meant: --run FOLDER, --adapter FOLDER or --model FOLDER_OR_ID"),
        (["--run", "nowhere", "--prompt", "x"], "nowhere is not a run folder"),
        (["--model", "no/such/model", "--prompt", "x"], "model.path 'no/such/model' does not exist"),
        (
            ["--run", "RUN", "--step", "last"],
            "no last adapter yet (the run is running, at step 7).\nIts other adapter",
        ),
        (
            ["--run", "RUN", "--step", "3", "--prompt", "x"],
            "keeps no checkpoint of step 3; kept are: none (and best, last)",
        ),
        (["--run", "RUN", "--step", "x"], "--step x: it is best, last, or the number of a kept step"),
        (["--run", "RUN", "--adapter", "x"], "--adapter does not go with --run, which has its own"),
        (["--model", "MODEL", "--step", "best"], "--step goes with --run"),
        (["--model", "MODEL", "--adapter", "nowhere"], "nowhere does not exist"),
        (["--run", "RUN", "--temperature", "-1"], "--temperature -1 must be 0 (greedy) or a positive number"),
        (["--run", "RUN", "--temperature", "nan"], "--temperature nan must be"),
        (["--run", "RUN", "--top-p", "0"], "--top-p 0 must be above 0 and at most 1"),
        (["--run", "RUN", "--max-new-tokens", "0"], "--max-new-tokens 0 must be at least 1"),
        (["--run", "RUN", "--max-new-tokens", "190", "--prompt", "abc"], "give at most 1"),
        (["--run", "RUN", "--prompt", "x" * 300], "the model was made for 200 with the answer: shorten it"),
        (["--run", "RUN", "--prompt", " "], "--prompt is empty"),
        (["--run", "RUN", "--prompt", "\udcff"], "--prompt is not UTF-8 text"),
        (["--run", "RUN", "--promt", "x"], "there is no option --promt: did you mean --prompt?"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_wrong_input_is_answered_in_a_line_or_two(ask, run, model, arguments, message):
    named = {"RUN": str(run), "MODEL": str(model)}
    code, out, told = ask(*(named.get(word, word) for word in arguments))
    error = told[told.index("error: ") :]
    assert (code, out) == (2, "")
    assert message in error
    assert len(error.splitlines()) <= 2


def test_a_run_without_any_adapter(tmp_path, run):
    config = RunDirectory.read(run).config
    RunDirectory.open(tmp_path / "new", config).close()
    with pytest.raises(InputError, match=r"no best adapter yet \(the run is not begun, at step 0\)") as error:
        generate.main(["--run", str(tmp_path / "new"), "--prompt", "x"])
    assert "appears with the first evaluation" in str(error.value)


def test_help_comes_at_once(repository):
    """Best of three, so that a busy machine does not count."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        command = [sys.executable, "-m", "jaxlora.generate", "--help"]
        ended = subprocess.run(
            command, cwd=repository, capture_output=True, text=True, check=True, env=os.environ
        )
        seconds.append(time.perf_counter() - started)
        assert "--max-new-tokens" in ended.stdout
    assert min(seconds) < 1.5
