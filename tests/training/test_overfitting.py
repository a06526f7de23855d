"""The alarm on real training: 200 rows over and over, against as many steps on rows that never come again."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.lora import tree as lora
from jaxlora.lora import variants
from jaxlora.lora.spec import TARGETS
from jaxlora.training.calendar import Calendar
from jaxlora.training.evaluate import Found
from jaxlora.training.state import new_state
from jaxlora.training.step import make_eval_step, make_train_step
from tests.training.conftest import settings, tiny_model
from tests.training.test_stopping import Story

LENGTH, ROWS, BATCH, STEPS, EVERY, HELD_OUT = 6, 200, 40, 240, 20, 200


@functools.cache
def language() -> np.ndarray:
    """A Markov chain over the vocabulary [V, V]: a few likely successors of each token, drawn once."""
    draw = np.random.default_rng(7)
    vocabulary = tiny_model()[0].spec.vocab_size
    return draw.dirichlet(np.full(vocabulary, 0.05), vocabulary)


def rows(draw: np.random.Generator, count: int) -> np.ndarray:
    """Sequences [count, LENGTH + 1] of the language."""
    cumulative = np.cumsum(language(), axis=1)
    found = np.empty((count, LENGTH + 1), np.int32)
    found[:, 0] = draw.integers(0, len(cumulative), count)
    for t in range(LENGTH):
        found[:, t + 1] = (draw.random(count)[:, None] > cumulative[found[:, t]]).sum(axis=1)
    return np.minimum(found, len(cumulative) - 1)


def batch(sequences: np.ndarray) -> dict[str, np.ndarray]:
    """[..., LENGTH + 1] -> what a step reads."""
    shape = sequences[..., :-1].shape
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape)
    return {
        "tokens": sequences[..., :-1], "targets": sequences[..., 1:], "weights": np.ones(shape, np.float32),
        "segments": np.ones(shape, np.int32), "positions": positions,
    }  # fmt: skip


def trained(again: bool, seeds: int) -> list[dict[int, Found]]:
    """What runs of the same length find at their evaluations; all at once, as a stack.

    Args:
        again: whether each trains on `ROWS` rows over and over, and not on new ones every step.
    """
    decoder, base, _ = tiny_model()
    adapter = lora.init(jax.random.key(1), base, dict.fromkeys(TARGETS, 16))
    numbers = settings(
        learning_rate=1e-2, total_steps=STEPS, final_fraction=0.1, label_smoothing=0.0, weight_decay=0.0
    )
    start = [new_state(adapter, jax.random.key(seed), numbers) for seed in range(seeds)]
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *start)
    step = jax.jit(jax.vmap(make_train_step(decoder), in_axes=(0, None, 0)))
    evaluate = make_eval_step(decoder)

    @jax.jit
    def nll(states, sequences):
        def one(state, sequences):
            read = variants.effective(base, state.adapter, state.settings.lora_scale, state.anchor)
            return evaluate(read, base, sequences).nll.mean(axis=-1)

        return jax.vmap(one)(states, sequences)

    draws = [np.random.default_rng([seed, again]) for seed in range(seeds)]
    seen = np.stack([rows(draw, ROWS) for draw in draws])
    held_out = np.stack([rows(draw, HELD_OUT) for draw in draws])
    found: list[dict[int, Found]] = [{} for _ in range(seeds)]
    for number in range(STEPS + 1):
        if number % EVERY == 0:
            columns = [np.asarray(nll(states, batch(x)), np.float64) for x in (held_out, seen[:, :64])]
            for run, (held, train) in zip(found, zip(*columns, strict=True), strict=True):
                files = {name: per_example(x) for name, x in (("eval", held), ("train_eval", train))}
                run[number] = Found(
                    {"eval/nll": float(held.mean()), "train_eval/nll": float(train.mean())}, files
                )
        if again:
            chosen = np.stack(
                [x[draw.choice(ROWS, BATCH, replace=False)] for x, draw in zip(seen, draws, strict=True)]
            )
        elif number < ROWS // BATCH:
            chosen = seen[:, number * BATCH : (number + 1) * BATCH]
        else:
            chosen = np.stack([rows(draw, BATCH) for draw in draws])
        states, _ = step(states, base, batch(chosen[:, None]))
    return found


def per_example(nll: np.ndarray) -> dict[str, list[Any]]:
    return {"example": list(range(len(nll))), "nll": nll.tolist(), "tokens": [LENGTH] * len(nll)}


def overfits_since(found: dict[int, Found]) -> int | None:
    """The step since which the alarm says that a run overfits."""
    story = Story(Calendar(EVERY, STEPS), found.__getitem__).go()
    return story.standing.overfit["since"] if story.standing.overfit else None


@pytest.mark.slow
def test_two_hundred_rows_over_and_over_raise_the_alarm():
    for run in trained(again=True, seeds=4):
        since = overfits_since(run)
        assert since is not None
        nll = {step: found.metrics["eval/nll"] for step, found in run.items()}
        assert since == min(nll, key=lambda step: nll[step]) < STEPS / 2


@pytest.mark.slow
def test_a_healthy_run_raises_no_alarm():
    assert [overfits_since(run) for run in trained(again=False, seeds=20)] == [None] * 20
