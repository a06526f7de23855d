"""The benchmarks run, at sizes whose figures mean nothing, and what they count is what it should be."""

import argparse
import importlib
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import commands, data, report, side_jaxlora, timing, train_vs_peft
from benchmarks.children import Child, Side, SideError
from benchmarks.ours import OurStep, filled, random_base
from benchmarks.shapes import SHAPES, spec
from benchmarks.traffic import moved
from jaxlora.config.build import programs

JOB = {
    "shape": "toy",
    "dtype": "float32",
    "remat": "none",
    "rows": 2,
    "length": 16,
    "steps": 1,
    "examples": "",
}


def run(name, monkeypatch, tmp_path, *words):
    """A benchmark's toy, in this process; the figures that it wrote."""
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", [name, "--toy", "--rounds", "1", "--out", str(out), *words])
    importlib.import_module(f"benchmarks.{name}").main()
    return json.loads(out.read_text())


@pytest.fixture
def missing(monkeypatch):
    """Makes it so that packages of these names are not installed."""
    find = importlib.util.find_spec

    def without(*names):
        monkeypatch.setattr(
            commands.importlib.util,
            "find_spec",
            lambda name, *rest: None if name in names else find(name, *rest),
        )

    return without


# ---- each runs, and says what it ran on ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["attention", "evaluate", "generate", "hotspots", "loss", "roofline"])
def test_a_toy_runs(name, monkeypatch, tmp_path, capsys):
    told = run(name, monkeypatch, tmp_path)
    assert told["command"].startswith(f"python -m benchmarks.{name} --toy")
    assert told["device"] == report.device()
    assert {"python", "jax", "jaxlib"} <= set(told["versions"])
    assert told["results"]
    assert capsys.readouterr().out.count("\n") > 2


def test_data_are_counted_and_a_missing_packer_is_said(monkeypatch, tmp_path, capsys, missing):
    missing("trl")
    told = run("data", monkeypatch, tmp_path)
    results = told["results"]
    assert told["device"].startswith("cpu")
    assert "datasets" in told["versions"]
    assert results["conversations"] == 200  # the lines of the quickstart's eval.jsonl
    assert 0 < results["cached"]["parts"]["tokenise"]["median"] < results["cached"]["seconds"]["median"]
    assert "not installed, so not measured: pip install trl" in capsys.readouterr().out
    assert "efficiency_of_bfd" not in results


def test_the_efficiency_beside_trl_is_of_the_same_lengths():
    pytest.importorskip("trl")
    assert data.bfd([5, 3, 4, 4], 8) == 1.0
    assert data.bfd([5, 5, 5], 8) == pytest.approx(15 / 24)


@pytest.mark.slow
def test_a_toy_starts(monkeypatch, tmp_path):
    results = run("startup", monkeypatch, tmp_path)["results"]
    assert 0 < results["warm"]["first_step"]["median"] < results["warm"]["end"]["median"]
    assert set(results["help"]) == {"train", "sweep", "evaluate", "generate", "export", "plan", "journal"}


@pytest.mark.slow
def test_both_sides_of_a_toy_train(monkeypatch, tmp_path):
    told = run("train_vs_peft", monkeypatch, tmp_path)
    (found,) = told["results"].values()
    assert {"torch", "transformers", "peft"} <= set(told["versions"])
    assert set(found["speed"]) == {"jaxlora, bfloat16", "PEFT, bfloat16"}
    assert found["ratio"]["best"]["median"] > 0
    assert all(side["peak_whole"] > 10**7 for side in found["sides"].values())


@pytest.mark.slow
def test_a_missing_peer_is_said_and_ours_is_measured(monkeypatch, tmp_path, capsys, missing):
    missing("peft")
    conversations = ("--conversations", str(train_vs_peft.QUICKSTART / "eval.jsonl"))
    (found,) = run("train_vs_peft", monkeypatch, tmp_path, *conversations)["results"].values()
    assert list(found["speed"]) == ["jaxlora, bfloat16"]
    assert "PEFT: not installed, so not measured: pip install peft" in capsys.readouterr().out


# ---- both sides do the same work -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    """A job whose examples are 8 of 3 to 10 ids."""
    lengths = np.arange(3, 11)
    file = tmp_path_factory.mktemp("examples") / "examples.npz"
    trained = np.ones(lengths.sum(), bool)
    ids = np.arange(lengths.sum(), dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    np.savez(file, ids=ids, trained=trained, offsets=offsets, source_rows=np.arange(8))
    return JOB | {"examples": str(file)}


def test_an_epoch_has_as_many_useful_tokens_on_both_sides(conversations):
    peft = pytest.importorskip("benchmarks.side_peft")
    ours = side_jaxlora.conversations(conversations)
    packed = [np.count_nonzero(ours.batch(step)["segments"]) for step in range(1, ours.steps_per_epoch + 1)]
    batches = peft.padded(conversations)
    padded = [next(batches) for _ in range(4)]
    assert sum(packed) == sum(useful for _, useful in padded) == sum(range(2, 10))
    assert all(batch["input_ids"].shape[1] == batch["attention_mask"].sum(1).max() for batch, _ in padded)


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
@pytest.mark.parametrize("shape", ["toy", "40M"])
def test_both_sides_have_one_shape(shape):
    peft = pytest.importorskip("benchmarks.side_peft")
    theirs, ours = peft.adapted(JOB | {"shape": shape}, "cpu"), OurStep(spec(shape), 2, 16, "float32", "none")
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in theirs.parameters() if not p.requires_grad)
    state = programs.state_shapes(ours.config, ours.model, 10)
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(state.adapter)) == trained
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(ours.model.shapes())) == frozen
    head, frequencies = spec(shape).head_dim, theirs.base_model.model.model.rotary_emb.inv_freq
    np.testing.assert_allclose(
        frequencies, SHAPES[shape]["rope_theta"] ** (-np.arange(0, head, 2) / head), rtol=1e-5
    )


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_layers_that_are_written_out_take_the_same_steps(remat):
    shape, flops = spec("toy"), []

    def losses(scan_layers):
        ours = OurStep(shape, 2, 16, "float32", remat, scan_layers=scan_layers)
        flops.append(ours.compiled.cost_analysis()["flops"])
        step, batch = ours.starter(random_base(shape, "float32")), ours.put(filled(2, 16, shape.vocab_size))
        return [float(step(batch).nll) for _ in range(4)]

    written, scanned = losses(False), losses(True)
    np.testing.assert_allclose(written, scanned, rtol=1e-6)
    assert written[-1] < 0.999 * written[0]
    assert flops[0] > 1.3 * flops[1], "of a loop, the compiler counts one turn"


def test_a_card_without_room_has_every_layer_computed_again(monkeypatch):
    peft = pytest.importorskip("benchmarks.side_peft")
    asked = []

    def built(job):
        def run():
            asked.append(job["remat"])
            if job["remat"] == "none":
                raise peft.torch.OutOfMemoryError("no room")
            return 1

        return Side(run, lambda: None, {"remat": job["remat"]})

    monkeypatch.setattr(peft, "built", built)
    monkeypatch.setattr(peft.torch.compiler, "reset", lambda: None)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(peft.torch.cuda, name, lambda: None)
    monkeypatch.setattr(peft.torch.cuda, "is_available", lambda: True)
    assert peft.build(JOB).facts == {"remat": "full"}
    assert asked == ["none"]


def test_a_side_that_fails_says_why():
    with pytest.raises(SideError, match="KeyError: 'nobody'"):
        Child("benchmarks.side_jaxlora", JOB | {"shape": "nobody"})


def test_a_side_that_dies_is_said_to():
    with pytest.raises(SideError, match="ended with code 0"):
        Child("benchmarks.shapes", JOB)


def test_examples_of_a_row_restart():
    batch = filled(2, 7, 100, examples=3)
    np.testing.assert_array_equal(batch["segments"][1], [1, 1, 2, 2, 3, 3, 3])
    np.testing.assert_array_equal(batch["positions"][1], [0, 1, 0, 1, 0, 1, 2])
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])


# ---- turns, medians, ratios -------------------------------------------------------------------------------------


def test_sides_take_turns():
    order = []
    taken = timing.in_turn({name: lambda name=name: order.append(name) for name in "ab"}, rounds=2)
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert {name: len(seconds) for name, seconds in taken.items()} == {"a": 2, "b": 2}


def test_ratios_are_of_a_round_each():
    assert timing.ratios([2.0, 9.0, 8.0], [1.0, 3.0, 2.0]) == {"median": 3.0, "least": 2.0, "most": 4.0}


def test_the_best_dtypes_are_compared():
    def side(seconds, peak):
        return {"rounds": [{"tokens": 60, "seconds": s} for s in seconds], "peak": peak, "peak_whole": peak}

    found = {
        "jaxlora, bfloat16": side([1.0, 2.0, 1.0], 10),
        "jaxlora, float32": side([3.0, 3.0, 3.0], 30),
        "PEFT, bfloat16": side([6.0, 6.0, 6.0], 40),
        "PEFT, float32": side([2.0, 2.0, 2.0], 80),
        "PEFT, compiled, bfloat16": {"failed": "no compiler"},
    }
    told = train_vs_peft.summary(found)
    assert told["ratio"]["best"] == {
        "median": 2.0, "least": 1.0, "most": 2.0, "of": "jaxlora, bfloat16", "to": "PEFT, float32",
    }  # fmt: skip
    assert told["ratio"]["bfloat16"]["median"] == 6.0
    assert told["memory"] == {"bfloat16": 0.25, "float32": 0.375, "best": 0.125}


def test_a_part_of_the_results_is_replaced_and_the_others_stay(tmp_path):
    file = tmp_path / "new" / "results.json"
    report.keep(file, {"a": 1, "b": 1})
    report.keep(file, {"b": 2})
    assert json.loads(file.read_text()) == {"a": 1, "b": 2}


def test_a_toy_leaves_no_figures_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for toy in (True, False):
        report.Report("loss", argparse.Namespace(out=None, toy=toy)).write("1 x NVIDIA H100, 8 cores", (), 1)
        assert [file.name for file in tmp_path.iterdir()] == ([] if toy else ["loss-nvidia-h100.json"])


@pytest.mark.parametrize("words", [["--rounds", "0"], ["--shapes", "9B"], ["--conversations", "none.jsonl"]])
def test_a_bad_argument_is_refused(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_vs_peft", *words])
    with pytest.raises(SystemExit, match="2"):
        train_vs_peft.parse()
    assert words[1] in capsys.readouterr().err


# ---- bytes moved ------------------------------------------------------------------------------------------------


def compiled(function, *given):
    return jax.jit(function).lower(*given).compile()


def total(program):
    return sum(moved(program.as_text()).values())


X, TALL = jnp.ones((300, 200)), jnp.ones((10, 300, 200))
PROGRAMS = {
    "a product": (lambda x: jnp.sin(x.T @ x), X),
    "elements": (lambda x: jnp.sin(x) * 2 + x, X),
    "a reduction": (jax.nn.softmax, X),
    "a slice": (lambda x, i: jax.lax.dynamic_index_in_dim(x, i, 0, False) * 2, TALL, 3),
    "a part written": (lambda x, y, i: jax.lax.dynamic_update_index_in_dim(x, jnp.sin(y), i, 0), TALL, X, 3),
}


@pytest.mark.parametrize("case", PROGRAMS)
def test_bytes_are_those_that_xla_counts_without_loops(case):
    program = compiled(*PROGRAMS[case])
    assert total(program) == program.cost_analysis()["bytes accessed"]


def test_a_slice_of_bfloat16_is_counted_without_the_rest():
    """XLA's CPU backend writes it as a conversion of all and a slice of that, and computes the slice."""
    program = compiled(PROGRAMS["a slice"][0], TALL.astype(jnp.bfloat16), 3)
    assert total(program) == pytest.approx(2 * 2 * 300 * 200, rel=1e-3)


def test_bytes_of_a_loop_are_counted_as_often_as_it_turns():
    def looped(x, turns):
        return jax.lax.scan(lambda y, _: (jnp.sin(y), None), x, None, length=turns)[0]

    def counted(turns):
        return total(compiled(lambda x: looped(x, turns), jnp.zeros(5000)))

    a_turn = 2 * 4 * 5000
    assert counted(30) - counted(20) == pytest.approx(10 * a_turn, rel=0.01)  # and the loop's counter
