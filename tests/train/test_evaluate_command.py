"""The evaluate command: what training found is found again, to the last bit."""

import gc
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlora import evaluate
from jaxlora.config.build import programs
from jaxlora.training.metrics import ANSWER_METRICS, METRICS


@pytest.fixture
def scored(call) -> Callable[..., dict[str, Any]]:
    """scored(arguments, ...) -> the JSON object that the command prints on standard output, and nothing else."""

    def scored(*arguments: Any) -> dict[str, Any]:
        ended = call([*map(str, arguments), "--json"], evaluate)
        assert ended.code == 0, ended.err
        (line,) = ended.out.splitlines()
        return json.loads(line)

    return scored


def in_training(workdir: Path, step: int) -> dict[str, Any]:
    """The line of metrics.jsonl about an evaluation."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    (line,) = (line for line in lines if line["step"] == step and "eval/nll" in line)
    return line


def metrics(found: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in found.items() if name.startswith("eval")}


def of_tokens(found: dict[str, Any]) -> dict[str, float]:
    """Those that need no answers."""
    return {name: v for name, v in metrics(found).items() if name.removeprefix("eval/") not in ANSWER_METRICS}


# ---- the numbers are those of training ------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "number"), [("best", 4), ("last", 8), ("6", 6)])
def test_a_run_scores_as_it_did_in_training(step, number, run, scored, tmp_path):
    """Every metric, every example's loss, every answer: equal, not close."""
    workdir, out = run("plain"), tmp_path / "losses.jsonl"
    found = scored("--run", workdir, "--step", step, "--out", out)
    line = in_training(workdir, number)
    answered = set(ANSWER_METRICS) - {"answer_match"}  # no reference holds a value to match
    assert metrics(line).keys() == {f"eval/{name}" for name in (*METRICS, *answered)}
    assert metrics(found) == metrics(line)
    assert found["step"] == number
    assert (found["examples"], found["dtype"], found["max_length"]) == (20, "float32", 48)
    assert out.read_bytes() == (workdir / f"eval/eval-{number:08d}.jsonl").read_bytes()
    answers = (workdir / f"eval/answers-{number:08d}.jsonl").read_bytes()
    assert (tmp_path / "losses.answers.jsonl").read_bytes() == answers


def test_the_rows_that_a_run_held_out(run, scored, told):
    """A share of data.train, drawn by the seed, of which the first few are evaluated; without packing, in bfloat16."""
    workdir = run("held out")
    told.clear()
    found, line = scored("--run", workdir), in_training(workdir, 6)
    assert told == [1], "attention knows that a row has one example"
    for name in ("perplexity", "top5_accuracy", "entropy", "ece"):  # not among the run's eval.metrics
        found.pop(f"eval/{name}")
    assert metrics(found) == metrics(line)
    assert (found["examples"], found["train_on"], found["dtype"]) == (7, "all", "bfloat16")
    data = json.loads((workdir / "record.json").read_text())["data"]["eval"]
    assert data["fingerprint"] == found["fingerprint"]
    assert data["trained_tokens"] == found["trained_tokens"]


def test_the_slice_of_the_training_data(run, project, scored, tmp_path):
    """As many examples as are held out, drawn by the seed, with the losses that all of data.train has there."""
    workdir, out = run("plain"), tmp_path / "losses.jsonl"
    scored("--run", workdir, "--step", "last", "--data", project.folder / "train.jsonl", "--out", out)
    everything = {row["example"]: row for row in map(json.loads, out.read_text().splitlines())}
    found = [json.loads(row) for row in (workdir / "eval/train_eval-00000008.jsonl").read_text().splitlines()]
    assert len(found) == 20
    assert [row["example"] for row in found] != list(range(20))
    for row in found:
        assert row == {
            **everything[row["example"]],
            "nll": pytest.approx(everything[row["example"]]["nll"], rel=1e-5),
        }
    total = sum(row["nll"] * row["tokens"] for row in found) / sum(row["tokens"] for row in found)
    assert in_training(workdir, 8)["train_eval/nll"] == pytest.approx(total, rel=1e-12)


def test_metrics_of_answers_need_answers(run, project, scored, call):
    arguments = [
        "--run",
        str(run("plain")),
        "--data",
        str(project.folder / "eval.jsonl"),
        "--metrics",
        "chrf",
    ]
    refused = call(arguments, evaluate)
    assert refused.code == 2
    assert refused.err.endswith(
        "error: --metrics chrf: of answers, and none are generated; give --generate 64, say.\n"
    )
    assert list(metrics(scored(*arguments, "--generate", 2))) == ["eval/chrf"]


def test_variants(run, scored):
    workdir = run("variants")
    for step in ("last", "3"):
        found = scored("--run", workdir, "--step", step)
        assert metrics(found) == metrics(in_training(workdir, found["step"]))


def test_ranks_by_module(run, scored):
    """Their scales are multiplied into b where the adapter is written: the same to rounding."""
    found = scored("--run", run("ranks"), "--step", "last")
    assert metrics(found) == pytest.approx(metrics(in_training(run("ranks"), 6)), rel=1e-6)


def test_a_bare_base_is_step_0(run, project, scored, tmp_path):
    """By itself, and beside the run's adapter."""
    workdir, before = run("plain"), metrics(in_training(run("plain"), 0))
    like = "--max-length", 48, "--dtype", "float32", "--generate", 5, "--max-new-tokens", 4
    alone = scored("--model", project.model, "--data", project.folder / "eval.jsonl", *like)
    assert metrics(alone) == pytest.approx(before, rel=1e-6)
    assert (alone["run"], alone["adapter"], alone["step"]) == (None, None, None)

    both = scored("--run", workdir, "--step", "last", "--with-base", "--out", tmp_path / "losses.jsonl")
    assert both["base"] == metrics(alone)
    assert metrics(both) == metrics(in_training(workdir, 8))
    rows = [json.loads(row) for row in (tmp_path / "losses.base.jsonl").read_text().splitlines()]
    assert sum(row["nll"] * row["tokens"] for row in rows) / sum(
        row["tokens"] for row in rows
    ) == pytest.approx(both["base"]["eval/nll"], rel=1e-12)


def test_an_adapter_that_was_copied_elsewhere(run, project, scored, tmp_path):
    adapter = shutil.copytree(run("plain") / "best", tmp_path / "elsewhere")
    data = "--data", project.folder / "eval.jsonl", "--max-length", 48, "--dtype", "float32"
    line = of_tokens(in_training(run("plain"), 4))
    assert metrics(scored("--adapter", adapter, *data)) == line
    base = shutil.copytree(project.model, tmp_path / "base")
    assert metrics(scored("--adapter", adapter, "--model", base, *data)) == line


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:peft")
def test_peft_and_transformers_find_the_same(run, project, scored):
    """Token by token from their logits, over the examples one at a time."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from jaxlora.data.chat import ChatEncoder, load_tokenizer
    from jaxlora.data.sources import load_conversations

    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(project.model, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(model, run("plain") / "last").eval()
    source = load_conversations(str(project.folder / "eval.jsonl"))
    encoder = ChatEncoder(load_tokenizer(str(project.model)))
    total = hits = weight = 0.0
    for example in encoder.encode_batch(source.conversations(0, len(source))):
        ids = torch.from_numpy(example.ids.astype(np.int64))
        with torch.no_grad():
            losses = torch.log_softmax(adapted(ids[None, :-1]).logits[0], -1)
        kept = torch.from_numpy(example.trained[1:])
        total -= losses.gather(1, ids[1:, None])[:, 0][kept].double().sum().item()
        hits += (losses.argmax(-1) == ids[1:])[kept].sum().item()
        weight += kept.sum().item()
    found = scored("--run", run("plain"), "--step", "last", "--generate", 0)
    assert found["trained_tokens"] == weight
    assert found["eval/nll"] == pytest.approx(total / weight, rel=1e-5)
    assert found["eval/token_accuracy"] == hits / weight


# ---- what must not matter -------------------------------------------------------------------------------------------


def losses_of(out: Path) -> list[float]:
    return [json.loads(line)["nll"] for line in out.read_text().splitlines()]


@pytest.mark.parametrize(
    ("flags", "count", "used"),
    [
        (("--batch-size", "1"), 1, 1),
        (("--batch-size", "3"), 1, 1),
        (("--batch-size", "8", "--no-packing"), 1, 1),
        (("--batch-size", "3", "--max-length", "60"), 8, 3),
        ((), 8, 8),
        (("--shard-base",), 8, 8),
    ],
    ids=str,
)
def test_layouts_and_devices(flags, count, used, run, call, devices, tmp_path):
    """Batch sizes, packing, lengths of rows, and how many devices there are."""
    workdir, out = run("plain"), tmp_path / "losses.jsonl"
    devices(count)
    ended = call(["--run", str(workdir), "--step", "last", "--generate", "0", "--out", str(out), "--json", *flags],
                 evaluate)  # fmt: skip
    assert ended.code == 0, ended.err
    line = of_tokens(in_training(workdir, 8))
    assert metrics(json.loads(ended.out)) == pytest.approx(line, rel=1e-5)
    assert losses_of(out) == pytest.approx(losses_of(workdir / "eval/eval-00000008.jsonl"), rel=1e-5)
    assert (f"{used} of {count} devices are used" in ended.err) == (used != count)


def test_a_base_that_was_cut_over_the_devices(run, scored, call, devices):
    """On as many devices the same bits; on fewer the same numbers, with the base cut over those that the rows take."""
    workdir = run("cut")
    devices(8)
    assert metrics(scored("--run", workdir, "--step", "last")) == metrics(in_training(workdir, 6))
    refused = call(["--run", str(workdir), "--batch-size", "3"], evaluate)
    assert refused.code == 2
    assert refused.err.splitlines()[-1] == (
        "error: --batch-size 3 cannot be shared out evenly over 8 devices (mesh.data x mesh.fsdp); set it to a "
        "multiple of 8, such as --batch-size=8."
    )
    devices(2)
    ended = call(["--run", str(workdir), "--step", "last"], evaluate)
    assert ended.code == 0, ended.err
    assert (
        "the run's mesh (mesh.data = 1, mesh.fsdp = 8, mesh.tensor = 1) does not fit 2 devices" in ended.err
    )
    assert "2 x cpu (mesh: data 1, fsdp 2, tensor 1)" in ended.out
    assert metrics(scored("--run", workdir, "--step", "last")) == pytest.approx(
        metrics(in_training(workdir, 6)), rel=1e-5
    )


def test_memory_and_programs_do_not_grow_with_the_data(run, project, scored, tmp_path, monkeypatch, counted):
    """The devices hold as much for 400 rows as for 20, and one program serves all."""
    most: list[int] = []
    put_batch = programs.put_batch

    def live() -> int:
        return sum(array.nbytes for array in jax.live_arrays())

    def watched(*arguments: Any) -> Any:
        put, before = put_batch(*arguments), live()

        def watching(batch: Any) -> Any:
            most[-1] = max(most[-1], live() - before)
            return put(batch)

        return watching

    rows = (project.folder / "eval.jsonl").read_text()
    many = tmp_path / "many.jsonl"
    many.write_text(rows * 20)
    monkeypatch.setattr(programs, "put_batch", watched)
    found = []
    for data in (project.folder / "eval.jsonl", many):
        gc.collect()
        most.append(0)
        found.append(scored("--run", run("plain"), "--data", data, "--batch-size", 2, "--no-packing"))
        assert counted.pop("evaluate") == 1
    assert [one["examples"] for one in found] == [20, 400]
    assert found[0]["eval/nll"] == pytest.approx(found[1]["eval/nll"], rel=1e-6)
    assert most[0] == most[1] > 0


# ---- other data, and what a person sees -----------------------------------------------------------------------------


def test_other_data(run, project, scored):
    """Several files, the first examples of them, some of the metrics; the run's answers are for its own data."""
    files = project.folder / "eval.jsonl", project.folder / "train.jsonl"
    found = scored(
        "--run", run("plain"), "--data", *files, "--max-examples", 33, "--metrics", "token_accuracy,nll"
    )
    assert found["examples"] == 33
    assert found["data"] == [str(file) for file in files]
    names = ["token_accuracy", "nll"]
    assert list(metrics(found)) == [
        f"eval{group}/{name}" for group in ("", "_by_source/eval", "_by_source/train") for name in names
    ]
    part = scored("--run", run("plain"), "--data", files[1], "--split", "train[:13]", "--metrics", "nll")
    own = scored("--run", run("plain"), "--metrics", "nll", "--generate", 0)
    assert found["eval_by_source/eval/nll"] == pytest.approx(own["eval/nll"], rel=1e-5)
    assert found["eval_by_source/train/nll"] == pytest.approx(part["eval/nll"], rel=1e-5)
    tokens = part["trained_tokens"], own["trained_tokens"]
    assert found["trained_tokens"] == sum(tokens)
    assert found["eval/nll"] == pytest.approx(
        (part["eval/nll"] * tokens[0] + own["eval/nll"] * tokens[1]) / sum(tokens), rel=1e-5
    )


def test_the_table(run, call):
    ended = call(["--run", str(run("plain")), "--with-base"], evaluate)
    assert ended.code == 0, ended.err
    before, line = in_training(run("plain"), 0), in_training(run("plain"), 4)
    facts, table = ended.out.split("what came of it\n")
    for words in (
        f"with {run('plain')}/best, step 4, eval nll {line['eval/nll']:.4f} (float32)", "eval.jsonl",
        "20 in 10 rows of 48", "trained tokens  ", "1 x cpu (mesh: data 1, fsdp 1, tensor 1)", "tokens/s",
    ):  # fmt: skip
        assert words in facts
    heading, *rows = table.splitlines()
    assert re.split(r"  +", heading.strip()) == ["with adapter", "bare base", "in training"]
    expected = [
        [name, f"{line[f'eval/{name}']:.6g}", f"{before[f'eval/{name}']:.6g}", f"{line[f'eval/{name}']:.6g}"]
        for name in (name.removeprefix("eval/") for name in metrics(line))
    ]
    assert [row.split() for row in rows] == expected
    assert "\x1b" not in ended.out + ended.err


def test_data_that_changed_since_is_told(run, project, call, tmp_path):
    """And it is not set beside what training found."""
    workdir = Path(shutil.copytree(run("plain"), tmp_path / "run"))
    config = json.loads((workdir / "config.json").read_text())
    data = tmp_path / "eval.jsonl"
    data.write_text((project.folder / "eval.jsonl").read_text().replace('"content": "', '"content": "z'))
    config["data"]["eval"] = str(data)
    (workdir / "config.json").write_text(json.dumps(config))
    ended = call(["--run", str(workdir), "--generate", "0"], evaluate)
    assert ended.code == 0, ended.err
    assert f"the held-out data of {workdir} is not what it was in training" in ended.err
    assert "in training" not in ended.out


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_a_real_model_on_stories(family, real, scored):
    """16 stories, all of their tokens; the numbers are those of transformers in float32, one story at a time."""
    found = scored("--model", real / f"models/stories260k-{family}", "--data", real / "data/tinystories_sample.jsonl",
                   "--dtype", "float32")  # fmt: skip
    assert (found["examples"], found["truncated"], found["trained_tokens"]) == (16, 11, 7723)
    assert found["eval/nll"] == pytest.approx(1.672146050271023, rel=1e-6)
    assert found["eval/token_accuracy"] == pytest.approx(4303 / 7723, rel=1e-12)
