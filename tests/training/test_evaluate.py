"""An evaluation's numbers are those of dense logits, however its examples are laid out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.data.batches import EvalBatches, Examples
from jaxlora.lora import tree as lora
from jaxlora.models.decoder import unembedding
from jaxlora.parallel import sharding
from jaxlora.parallel.mesh import make_mesh
from jaxlora.training.evaluate import Evaluator, Groups, later_turn
from jaxlora.training.metrics import METRICS
from jaxlora.training.step import make_eval_step
from tests.training.conftest import tiny_model

LENGTH = 24
SOURCES = np.arange(13) % 3


@pytest.fixture(scope="module")
def examples():
    """Thirteen examples of 4 to 20 ids, each with another share of trained tokens in other stretches."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(4, 21, 13)
    trained = [draw.random(n) < 0.6 for n in lengths]
    for mask in trained:
        mask[-1] = True
    return Examples(
        ids=draw.integers(0, 72, lengths.sum()).astype(np.int32),
        trained=np.concatenate(trained),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        source_rows=np.arange(13, dtype=np.int64),
        conversations=13,
        truncated=0,
        dropped=0,
        max_length=LENGTH,
        name="drawn",
    )


@functools.cache
def decided():
    """The tiny model with a head six times as large, so that its confidences fall into many ranges: (decoder, base,
    adapter as the decoder reads it).
    """
    decoder, base, adapter = tiny_model()
    return (
        decoder,
        {**base, "lm_head": jax.tree.map(lambda x: 6 * x, base["lm_head"])},
        lora.scale(adapter, 2.0),
    )


@functools.cache
def program(mesh_shape=(1, 1, 1)):
    """(compiled for each shape once, base, adapter, put) on so many devices."""
    decoder, base, adapter = decided()
    if mesh_shape == (1, 1, 1):
        return jax.jit(make_eval_step(decoder)), base, adapter, jax.device_put
    mesh = make_mesh(mesh_shape, jax.devices())
    decoder = decoder.clone(activation_sharding=sharding.activation_sharding(mesh))
    base, adapter = (jax.device_put(tree, sharding.tree_shardings(mesh, tree)) for tree in (base, adapter))
    rows = sharding.batch_sharding(mesh, micro_batches=False)
    return jax.jit(make_eval_step(decoder)), base, adapter, lambda batch: jax.device_put(batch, rows)


def evaluate(
    examples, groups=None, rows=3, packing=True, devices=(1, 1, 1), metrics=tuple(METRICS), progress=None
):
    step, base, adapter, put = program(devices)
    data = EvalBatches(examples, rows, LENGTH, packing=packing)
    return Evaluator(step, data, put, metrics, groups)(adapter, base, progress)


@pytest.fixture(scope="module")
def tokens(examples):
    """Columns over all trained tokens, from whole logits in float64, each example alone in a row."""
    decoder, base, adapter = decided()

    @jax.jit
    def logits_of(ids):
        positions = jnp.arange(LENGTH)[None]
        # Padding on the right is invisible to what comes before it, so one shape serves all lengths.
        variables = {"params": base, "lora": adapter}
        hidden = decoder.apply(variables, ids[None], positions, jnp.ones_like(positions))
        return (hidden @ unembedding(base).T)[0]

    found = []
    for e in range(len(examples)):
        ids, trained = examples[e]
        stretch, inside = 0, False
        for at, logits in enumerate(np.asarray(logits_of(np.pad(ids, (0, LENGTH - len(ids)))), np.float64)):
            if at + 1 >= len(ids) or not trained[at + 1]:
                inside = False
                continue
            stretch, inside = stretch + (not inside), True
            target = ids[at + 1]
            p = np.exp(logits - logits.max())
            p /= p.sum()
            five = np.argsort(-logits, kind="stable")[:5]
            found.append((e, stretch > 1, -np.log(p[target]), five[0] == target, target in five,
                          -(p * np.log(p)).sum(), p.max()))  # fmt: skip
    names = ("example", "later", "nll", "correct", "top5", "entropy", "confidence")
    return {
        name: np.array(column, float) for name, column in zip(names, zip(*found, strict=True), strict=True)
    }


def plain(tokens, chosen=True):
    """Every metric of some tokens, by its formula."""
    kept = {name: column[np.broadcast_to(chosen, column.shape)] for name, column in tokens.items()}
    error, n = 0.0, len(kept["nll"])
    for m in range(15):
        inside = [i for i in range(n) if m / 15 < kept["confidence"][i] <= (m + 1) / 15]
        if inside:
            accuracy = sum(kept["correct"][i] for i in inside) / len(inside)
            confidence = sum(kept["confidence"][i] for i in inside) / len(inside)
            error += len(inside) / n * abs(accuracy - confidence)
    return {
        "nll": kept["nll"].mean(), "perplexity": np.exp(kept["nll"].mean()), "token_accuracy": kept["correct"].mean(),
        "top5_accuracy": kept["top5"].mean(), "entropy": kept["entropy"].mean(), "ece": error,
    }  # fmt: skip


def expected(tokens):
    """What is logged: over all, by turn, by source."""
    later, source = tokens["later"] > 0, SOURCES[tokens["example"].astype(int)]
    groups = {"": True, "_by_turn/first": ~later, "_by_turn/later": later}
    groups |= {f"_by_source/{name}": source == s for s, name in enumerate("xyz")}
    return {f"eval{g}/{name}": v for g, kept in groups.items() for name, v in plain(tokens, kept).items()}


LAYOUTS = [(rows, packing, (1, 1, 1)) for rows in (1, 3, 8) for packing in (True, False)]
LAYOUTS += [(8, True, (8, 1, 1)), (8, False, (8, 1, 1)), (8, True, (2, 2, 2))]


@pytest.mark.parametrize(("rows", "packing", "devices"), LAYOUTS, ids=str)
def test_every_layout_gives_the_dense_numbers(examples, tokens, rows, packing, devices):
    groups, seen = Groups(examples, SOURCES, "xyz"), []
    found = evaluate(examples, groups, rows, packing, devices, progress=lambda *counts: seen.append(counts))
    assert found.metrics == pytest.approx(expected(tokens), rel=1e-5, abs=1e-7)
    assert list(found.metrics) == groups.logged(tuple(METRICS))
    weight = np.bincount(tokens["example"].astype(int))
    assert found.per_example["example"] == list(range(13))
    assert found.per_example["tokens"] == weight.tolist()
    nll = np.bincount(tokens["example"].astype(int), tokens["nll"]) / weight
    np.testing.assert_allclose(found.per_example["nll"], nll, rtol=1e-5)
    batches = EvalBatches(examples, rows, LENGTH, packing=packing).num_batches
    assert seen == [(i + 1, batches) for i in range(batches)]


def test_one_program_for_each_shape(examples):
    step = program()[0]
    evaluate(examples, rows=3)
    before = step._cache_size()
    evaluate(examples.select(np.array([4, 1])), rows=3, packing=False)
    assert step._cache_size() == before


def test_what_the_dense_numbers_hold(tokens):
    """A comparison of zeros with zeros would say nothing."""
    found = plain(tokens)
    assert found["token_accuracy"] < found["top5_accuracy"] < 0.5
    assert min(found.values()) > 0
    assert len(set(np.ceil(tokens["confidence"] * 15))) > 4


def test_a_source_is_what_its_examples_are_alone(examples):
    both = evaluate(examples, Groups(examples, SOURCES, "xyz")).metrics
    for source, name in enumerate("xyz"):
        alone = evaluate(examples.select(np.flatnonzero(source == SOURCES))).metrics
        assert {n: both[n.replace("eval/", f"eval_by_source/{name}/")] for n in alone} == pytest.approx(
            alone, rel=1e-5
        )


def test_a_turn_is_what_its_tokens_are_alone(examples):
    groups = Groups(examples)
    both = evaluate(examples, groups).metrics
    keep = np.zeros((2, len(examples.ids)), bool)
    for e in range(len(examples)):
        start, stop = examples.offsets[e : e + 2]
        mask = examples.trained[start:stop].copy()
        mask[0] = False
        first = np.flatnonzero(mask)[0]
        end = first + int(np.argmin(np.append(mask[first:], False)))
        keep[0, start + first : start + end] = True
        keep[1, start + end : stop] = mask[end:]
    for name, trained in zip(("first", "later"), keep, strict=True):
        alone = evaluate(dataclasses.replace(examples, trained=trained)).metrics
        assert {n: both[n.replace("eval/", f"eval_by_turn/{name}/")] for n in alone} == pytest.approx(
            alone, rel=1e-5
        )


def test_groups_are_there_only_where_they_say_something(examples):
    once = dataclasses.replace(examples, trained=np.ones_like(examples.trained))
    assert Groups(once, np.zeros(13, int), ("x",)).logged(["nll"]) == ["eval/nll"]
    one = np.full(13, 1)
    assert Groups(examples, one, "xy").logged(["ece"], "other") == [
        "other/ece", "other_by_turn/first/ece", "other_by_turn/later/ece"
    ]  # fmt: skip


def test_later_turns_restart_with_each_segment():
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 2, 2, 3, 3, 3]])
    weights = np.array([[1, 0, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 0, 1, 0, 1]], np.float32)
    later = [[0, 0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1]]
    np.testing.assert_array_equal(later_turn(segments, weights) * (weights > 0), later)


def test_a_diverged_model_is_told_as_it_is(examples):
    """NaN where there is no number, and no hit among them."""
    step, base, adapter, put = program()
    broken = jax.tree.map(lambda x: x * np.nan, adapter)
    found = Evaluator(step, EvalBatches(examples, 3, LENGTH), put, tuple(METRICS))(broken, base).metrics
    assert found["eval/token_accuracy"] == found["eval/top5_accuracy"] == 0
    for name in ("nll", "entropy", "ece", "perplexity"):
        assert np.isnan(found[f"eval/{name}"]), name
