"""Whether a step is like those before it: decided inside the compiled step, from numbers in its state.

So it is exact on the step itself, needs no look by the host, goes on after a resume as if nothing had been, and can be
stacked over adapters. Medians stand where means would: a spike moves the mean and the spread of what it is compared
with, and hides behind them; it takes half of the window to move a median.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

LOSS_FLOOR = 0.02
"""Least deviation of a loss: a share of the median, or of one nat where the median is less."""

NORM_FLOOR = 0.2
"""Least deviation of the logarithm of a gradient norm: at a threshold of 6 and a full window, a factor of 4.5."""

CAUTION = 8.0
"""A window of n entries makes the threshold 1 + 8 / n times as high: a short one knows little of the spread."""

DIVERGED = 0.1
"""Share of the first loss (or of one nat where it is less), times the threshold, by which a diverged one is higher."""

_CONSISTENT = 1.4826  # times the median absolute deviation is the standard deviation of a normal distribution


class Recent(NamedTuple):
    """The losses and gradient norms of the last W steps, the oldest overwritten first; part of the state.

    Attributes:
        loss: nats per trained token, never smoothed. log_norm: logarithm of the gradient's norm before clipping.
        count: int32, entries ever made. first: the first loss.
    """

    loss: Float[Array, "W"]
    log_norm: Float[Array, "W"]
    count: Int[Array, ""]
    first: Float[Array, ""]


class Alarm(NamedTuple):
    """How a step compares with those before it.

    Attributes:
        spike: whether it is one, by its loss or its gradient norm.
        loss_deviations, norm_deviations: by how many deviations each is above its median; 0 without an entry. They
            are divided by 1 + 8 / n, so that the threshold is the same number for every n.
        loss_median, norm_median: what they were compared with. first_loss: the first of all.
        diverged: whether the loss has stayed far above where it began, for most of a full window.
    """

    spike: Bool[Array, ""]
    loss_deviations: Float[Array, ""]
    norm_deviations: Float[Array, ""]
    loss_median: Float[Array, ""]
    norm_median: Float[Array, ""]
    first_loss: Float[Array, ""]
    diverged: Bool[Array, ""]


def no_steps(window: int) -> Recent:
    """Before the first step.

    Args:
        window: W, steps to compare with.
    """
    empty = jnp.zeros(window, jnp.float32)
    return Recent(empty, empty, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))


def compare(
    recent: Recent, loss: Float[Array, ""], norm: Float[Array, ""], threshold: Float[Array, ""] | float
) -> Alarm:
    """Compares a step with the n steps before it that `recent` holds.

        deviations(x) = (x - median) / (max(1.4826 * median |x_i - median|, floor) * (1 + 8 / n))

    A step is a spike where its loss or the logarithm of its gradient norm is more than `threshold` deviations above
    the median; never below: less is no accident. Without an entry nothing is.

    Args:
        recent: the steps before.
        loss: nats per trained token. norm: of the gradient, before clipping. A value that is not finite is no spike.
        threshold: in deviations.
    Source: Rousseeuw and Croux 1993 (the median absolute deviation and its factor).
    """
    size = recent.loss.shape[0]
    n = jnp.minimum(recent.count, size)
    caution = 1.0 + CAUTION / jnp.maximum(n, 1)
    known = n > 0

    def deviations(x, values, floor):
        median = _median(values, n)
        deviation = jnp.maximum(_CONSISTENT * _median(jnp.abs(values - median), n), floor(median))
        return jnp.where(known, (x - median) / (deviation * caution), 0.0), jnp.where(known, median, 0.0)

    by_loss, loss_median = deviations(loss, recent.loss, lambda m: LOSS_FLOOR * jnp.maximum(jnp.abs(m), 1.0))
    by_norm, log_median = deviations(_log(norm), recent.log_norm, lambda _: NORM_FLOOR)
    excess = DIVERGED * threshold * jnp.maximum(jnp.abs(recent.first), 1.0)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    return Alarm(
        spike=finite & ((by_loss > threshold) | (by_norm > threshold)),
        loss_deviations=by_loss,
        norm_deviations=by_norm,
        loss_median=loss_median,
        norm_median=jnp.where(known, jnp.exp(log_median), 0.0),
        first_loss=recent.first,
        diverged=(recent.count >= size) & (loss_median > recent.first + excess),
    )


def remember(
    recent: Recent, loss: Float[Array, ""], norm: Float[Array, ""], counted: Bool[Array, ""]
) -> Recent:
    """Enters a step, a spike too: what was a spike is the new level when half of the window is like it.

    Args:
        recent: the steps before.
        loss, norm: as for `compare`.
        counted: False leaves all as it is: a step that trained on nothing, or was not finite.
    """
    here = counted & (jnp.arange(recent.loss.shape[0]) == recent.count % recent.loss.shape[0])
    return Recent(
        loss=jnp.where(here, loss, recent.loss),
        log_norm=jnp.where(here, _log(norm), recent.log_norm),
        count=recent.count + counted,
        first=jnp.where(counted & (recent.count == 0), loss, recent.first),
    )


def _log(norm: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.log(jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))


def _median(values: Float[Array, "W"], n: Int[Array, ""]) -> Float[Array, ""]:
    """The median of the first n values; infinite for none."""
    ordered = jnp.sort(jnp.where(jnp.arange(values.shape[0]) < n, values, jnp.inf))
    below, above = ordered[jnp.maximum(n - 1, 0) // 2], ordered[n // 2]
    return jnp.where(n % 2 == 1, below, (below + above) / 2)
