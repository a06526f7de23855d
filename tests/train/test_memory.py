"""What does not fit is refused or made smaller before the first step, and said."""

import contextlib
import itertools
import json
import types
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from jaxlora import evaluate, train
from jaxlora.config.build import memory, programs
from jaxlora.config.schema import Config
from jaxlora.core.errors import InputError
from jaxlora.parallel.capacity import Capacity
from jaxlora.parallel.mesh import make_mesh
from jaxlora.runs.progress import Progress
from tests.train.conftest import RUNS

# ---- the search, with programs whose memory is known -----------------------------------------------------------------

STATE, OUTPUT, BATCH = 1_000, 7, 20
"""Bytes of the state, and of a row's outputs and batch; a row of training takes 100, of evaluation 150, of an answer
90."""


class Lowered(NamedTuple):
    """A program that says how much it takes: `held`, of which so much is outputs."""

    held: int
    output: int
    limit: int

    def compile(self, compiler_options: Any) -> "Lowered":
        if self.held > self.limit:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room")
        return self

    def memory_analysis(self) -> Any:
        return types.SimpleNamespace(
            argument_size_in_bytes=self.held - self.output + 3,
            output_size_in_bytes=self.output,
            alias_size_in_bytes=3,
            temp_size_in_bytes=0,
            generated_code_size_in_bytes=0,
        )


class FewAnswers:
    """Prompts to answer, as far as memory goes."""

    def __init__(self, batch_size: int, limit: int):
        self.batch_size, self.limit = batch_size, limit

    def lower(self, lora: Any, base: Any, rows: int) -> Lowered:
        return Lowered(90 * rows, 0, self.limit)

    def compiled(self, program: Lowered, rows: int) -> "FewAnswers":
        assert program.held == 90 * rows
        return FewAnswers(rows, self.limit)


@pytest.fixture
def fit(monkeypatch):
    """fit(size, shares, limit, ...) fits a run into so many bytes; the compiler gives up above `limit`."""

    def fit(
        size: int, shares: int = 1, limit: int = 10**9, generate: bool = False, row: int = 150
    ) -> memory.Fitted:
        config = Config.from_dict(
            {
                "model": {"path": "x"},
                "data": {"train": "x"},
                "train": {"batch_size": 96, "micro_batch_size": 32},
                "eval": {"batch_size": 48},
            }
        )
        mesh = make_mesh((shares, 1, 1), jax.local_devices()[:shares])
        model: Any = types.SimpleNamespace(mesh=mesh, shapes=dict)

        def lowered(section: str, key: str, row: int, output: int):
            return lambda config, *_: Lowered(
                row * getattr(getattr(config, section), key),
                output * getattr(getattr(config, section), key),
                limit,
            )

        state = jax.ShapeDtypeStruct(
            (STATE,), np.int8, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
        )
        patches = {
            "lora_shapes": lambda *_: {},
            "lower_effective": lambda *_: Lowered(STATE, 0, limit),
            "lower_train": lowered("train", "micro_batch_size", 100, 0),
            "lower_evaluation": lowered("eval", "batch_size", row, OUTPUT),
            "batch_shapes": lambda config, mesh, *rows: jax.ShapeDtypeStruct(
                (BATCH, *rows), np.int8, sharding=state.sharding
            ),
        }
        for name, patch in patches.items():
            monkeypatch.setattr(programs, name, patch)
        monkeypatch.setattr(memory, "capacity", lambda *_: Capacity(size, "said"))
        answers: Any = FewAnswers(48, limit) if generate else None
        with Progress() as progress:
            return memory.fit(config, model, state, answers, progress)  # pyright: ignore

    return fit


def of_training(rows: int) -> int:
    """While one batch is computed, two more are there."""
    return 100 * rows + 2 * BATCH * 96


def of_evaluation(rows: int) -> int:
    """State, the next training batch, one more eval batch and its losses."""
    return 150 * rows + STATE + BATCH * 96 + (BATCH + OUTPUT) * rows


@pytest.mark.parametrize("shares", [1, 2, 4])
def test_the_largest_micro_batch_that_fits_is_named(fit, shares):
    sizes = [n for n in range(shares, 33, shares) if 96 % n == 0]
    assert fit(max(of_training(32), of_evaluation(shares)), shares).needs["training"] == of_training(32)
    for rows, larger in itertools.pairwise(sizes):
        for size, limit in (
            (of_training(rows), 10**9),
            (of_training(larger) - 1, 10**9),
            (10**8, 100 * rows),
        ):
            limit = max(limit, STATE)  # the adapter's own program is no matter of rows
            if limit >= 100 * larger and size == 10**8:
                continue
            with pytest.raises(InputError) as refused:
                fit(size, shares, limit)
            said, remedy = str(refused.value).splitlines()
            assert said.startswith("train.micro_batch_size = 32 takes ")
            assert f"--config.train.micro_batch_size={rows}." in remedy, (rows, size, limit)
    with pytest.raises(InputError, match=r"still. What helps: a shorter data.max_length .*mesh.fsdp=-1"):
        fit(of_training(shares) - 1, shares)


@pytest.mark.parametrize(
    ("shares", "halves"), [(1, (48, 24, 12, 6, 3, 1)), (8, (48, 24, 8)), (3, (48, 24, 12, 6, 3))]
)
def test_eval_batches_are_halved_until_they_fit(fit, capsys, shares, halves):
    for rows, larger in zip(halves, (None, *halves), strict=False):
        size = max(of_evaluation(rows), of_training(32))
        if larger and size >= of_evaluation(larger):
            continue  # what training needs is enough for more
        found = fit(size, shares)
        assert found.config.eval.batch_size == rows
        assert found.needs == {"training": of_training(32), "evaluation": of_evaluation(rows)}
        said = capsys.readouterr().out
        assert ("evaluation: eval.batch_size = 48 would take 11.42 kB, and a device has" in said) == (
            rows < 48
        )
        assert (f"{rows} rows at once, " in said) == (rows < 48)


def test_answers_have_batches_of_their_own(fit, capsys):
    found = fit(of_training(32), generate=True, limit=4_000)
    assert (found.config.eval.batch_size, found.answers.batch_size) == (12, 24)
    assert found.needs["answers"] == 90 * 24 + STATE + BATCH * 96
    assert (
        "answers: eval.batch_size = 48 would take more than the compiler can place" in capsys.readouterr().out
    )


def test_an_evaluation_of_which_not_one_row_fits(fit):
    """One row of it takes more than 32 of training."""
    with pytest.raises(
        InputError, match=r"evaluation: even 2 rows at once takes [^\n]*\nWhat helps: a shorter data"
    ):
        fit(of_training(32), shares=2, row=4_000)


def test_other_failures_of_the_compiler_are_not_taken_for_memory(fit, monkeypatch):
    def fail(self: Lowered, compiler_options: Any) -> Lowered:
        raise jax.errors.JaxRuntimeError("INTERNAL: a defect")

    monkeypatch.setattr(Lowered, "compile", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a defect"):
        fit(10**9)


# ---- the commands ----------------------------------------------------------------------------------------------------


def test_training_that_does_not_fit_is_refused_and_leaves_nothing(project, call, tmp_path):
    ended = call(project.arguments(tmp_path / "run", mesh__memory_gb=0.002))
    assert ended.code == 2
    said, remedy = ended.err.splitlines()[-2:]
    assert said.startswith("error: train.micro_batch_size = 8 takes ")
    assert said.endswith(" of memory, and a device has 2.00 MB (mesh.memory_gb).")
    assert remedy.endswith("set --config.train.micro_batch_size=2. It changes nothing but speed.")
    assert not (tmp_path / "run").exists()


def curves(workdir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "train/tokens_per_second"} for line in lines]


@pytest.mark.slow
def test_a_smaller_eval_batch_changes_no_number_and_no_config(project, run, call, tmp_path, monkeypatch):
    """Interrupted and resumed as well: the same bits as without."""
    workdir = tmp_path / "run"
    arguments = project.arguments(workdir, **RUNS["few"])
    with monkeypatch.context() as patch:
        asked = iter([False] * 4)
        leaving = contextlib.nullcontext(lambda *_: next(asked, True))
        patch.setattr(train, "_leaving_on_request", lambda *_: leaving)
        first = call(arguments)
    assert first.code == 0, first.err
    assert "preempted: asked to leave at step 5" in first.out
    assert "evaluation: eval.batch_size = 64 would take " in first.out
    assert " and a device has 5.20 MB (mesh.memory_gb): 32 rows at once, " in first.out
    (row,) = (line for line in first.out.splitlines() if line.strip().startswith("memory"))
    assert "training " in row
    assert row.endswith("; a device has 5.20 MB (mesh.memory_gb)")
    assert call(arguments).code == 0
    assert json.loads((workdir / "config.json").read_text())["eval"]["batch_size"] == 64
    assert curves(workdir) == curves(run("few"))


@pytest.mark.parametrize(("rows", "exact"), [(None, True), (8, False)])
def test_evaluate_takes_what_fits(run, call, rows, exact):
    """By itself the batch of training, and so its bits."""
    asked = [] if rows is None else ["--batch-size", str(rows)]
    ended = call(["--run", str(run("few")), "--json", *asked], evaluate)
    assert ended.code == 0, ended.err
    assert ("evaluation: --batch-size 64 would take " in ended.err) == (rows is None)
    found = json.loads(ended.out)
    (line,) = (line for line in curves(run("few")) if line["step"] == found["step"] and "eval/nll" in line)
    expected = line["eval/nll"] if exact else pytest.approx(line["eval/nll"], rel=1e-6)
    assert found["eval/nll"] == expected
