"""Runs in memory, drawn from a few numbers: healthy ones of many kinds, and what can be planted in them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlora.experiments.records import Curves, Run
from jaxlora.experiments.verdict import Reading, verdict

CONFIG = {"model.path": "some/Model", "optim.learning_rate": 1e-4, "optim.warmup_steps": 100}


class Drawn(Run):
    """A run whose per-example losses are in memory: `tables` is step -> columns."""

    tables: Mapping[int, Mapping[str, list[Any]]]

    def examples(self, step, name="eval"):
        return self.__dict__.get("tables", {}).get(step)


def run(
    nll=None,
    evals=None,
    norm=None,
    every=10,
    name="run",
    status="finished",
    config=(),
    record=(),
    tables=None,
    **more,
) -> Drawn:
    """A run from its curves.

    Args:
        nll: [S] logged every `every` steps. norm: [S] gradient norms. more: other [S] columns, `train__x` for train/x.
        evals: {step: nll}.
        tables: {step: per-example columns}.
    """
    nll = np.asarray(nll if nll is not None else [], np.float64)
    steps = np.arange(1, len(nll) + 1) * every
    train = {"train/nll": nll} if len(nll) else {}
    if norm is not None:
        train["train/grad_norm"] = np.asarray(norm, np.float64)
    train |= {key.replace("__", "/"): np.asarray(values, np.float64) for key, values in more.items()}
    evaluated = (
        Curves(
            np.array(sorted(evals or {}), np.int64), {"eval/nll": np.array([evals[s] for s in sorted(evals)])}
        )
        if evals
        else Curves(np.zeros(0, np.int64), {})
    )
    last = int(max([0, *steps[-1:], *evaluated.steps[-1:]]))
    made = Drawn(
        name,
        Path(f"/nowhere/{name}"),
        CONFIG | dict(config),
        {"status": status, "steps": last} | dict(record),
        Curves(steps, train),
        evaluated,
    )
    made.__dict__["tables"] = tables or {}
    return made


def level(points: int, start: float = 2.6, end: float = 0.8, speed: float = 20.0) -> np.ndarray:
    """[points] a loss that falls as 1 / (1 + speed x), x from 0 to 1."""
    return end + (start - end) / (1 + speed * np.linspace(0, 1, points))


def healthy(draw: np.random.Generator, number: int) -> Drawn:
    """A run with nothing wrong: 12 to 1,000 logged losses, 3 to 40 evaluations, noise of 1 to 12 per cent.

    The noise is normal, or has the tails of Student's t with 6 degrees of freedom, or is skewed; it may hang together
    from one logged step to the next, and the loss may step down from epoch to epoch.
    """
    points = int(draw.choice([12, 40, 100, 300, 1000]))
    place = np.linspace(0, 1, points)
    course = level(points, draw.uniform(1.5, 6), draw.uniform(0.3, 1.4), draw.uniform(2, 60))
    if draw.random() < 0.3:
        course = course * np.select([place < 1 / 3, place < 2 / 3], [1, 0.93], 0.88)
    kind = draw.integers(3)
    noise = (
        draw.normal(size=points),
        draw.standard_t(6, size=points) / 1.22,
        4.4 * np.log(draw.gamma(20, 1 / 20, size=points)),
    )[kind]
    if draw.random() < 0.3:
        for i in range(1, points):
            noise[i] = 0.4 * noise[i - 1] + 0.917 * noise[i]
    nll = np.maximum(course * (1 + draw.uniform(0.01, 0.12) * noise), 0.01)
    norm = np.exp(draw.uniform(0.05, 0.35) * draw.normal(size=points)) * (1 + draw.uniform(-0.4, 0.5) * place)
    steps = np.unique(np.linspace(0, points * 10, int(draw.choice([4, 6, 10, 20, 40]))).astype(int)[1:])
    held_out = draw.uniform(0.4, 1.6) + draw.uniform(0.05, 1) / (1 + draw.uniform(3, 60) * steps / steps[-1])
    held_out *= 1 + draw.uniform(0, 0.008) * draw.normal(size=len(steps))
    evals = dict(zip(steps.tolist(), held_out.tolist(), strict=True))
    return run(nll, evals, norm, name=f"healthy{number}")


def table(losses: np.ndarray, tokens: np.ndarray) -> dict[str, list[Any]]:
    """Per-example columns."""
    return {"example": list(range(len(losses))), "nll": losses.tolist(), "tokens": tokens.tolist()}


def rule(name, made, old=None):
    """What a verdict says of one kind, None for nothing."""
    found = verdict(Reading(made), Reading(old) if old else None)
    return next((finding for finding in found if finding.kind == name), None)
