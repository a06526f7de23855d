"""One optimiser step, and one evaluation batch: the two programs that a run compiles."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxlora.core.prng import named
from jaxlora.lora import variants
from jaxlora.models.decoder import Decoder, unembedding
from jaxlora.parallel.sharding import head_spread
from jaxlora.training import spikes
from jaxlora.training.losses import TokenMetrics, chunks_for, cross_entropy, token_metrics
from jaxlora.training.optimizer import learning_rate, optimizer
from jaxlora.training.state import TrainState

Batch = Mapping[str, Any]
"""tokens, targets, segments, positions (int32) and weights (float32): [M, B, T] for training, [B, T] for evaluation."""


class StepSums(NamedTuple):
    """Sums over a step's trained tokens, and what the optimiser saw; float32 scalars but for the last.

    Attributes:
        objective: smoothed cross-entropy, summed. nll: unsmoothed, summed. correct: tokens predicted right.
        weight: trained tokens. tokens: tokens that are not padding.
        grad_norm: global norm of the mean gradient, before clipping.
        learning_rate: of this step's update.
        finite: 0 when loss or gradient was not finite.
        spike: 1 when the step was one, by nll or gradient norm (see `spikes.compare`, also for the next six).
        applied: 1 when the update was applied; 0 when the step was not finite, was a spike and spikes are skipped, or
            had no trained token.
        rows_nll: unsmoothed, the mean over each row's trained tokens; 0 for a row without any. Left on the device
            until a row has to be named.
    """

    objective: Float[Array, ""]
    nll: Float[Array, ""]
    correct: Float[Array, ""]
    weight: Float[Array, ""]
    tokens: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    finite: Float[Array, ""]
    spike: Float[Array, ""]
    loss_deviations: Float[Array, ""]
    norm_deviations: Float[Array, ""]
    loss_median: Float[Array, ""]
    norm_median: Float[Array, ""]
    first_loss: Float[Array, ""]
    diverged: Float[Array, ""]
    applied: Float[Array, ""]
    rows_nll: Float[Array, "M B"]


def make_train_step(decoder: Decoder, dropout: bool = False) -> Callable[..., tuple[TrainState, StepSums]]:
    """Builds `step(state, base, batch) -> (state, sums)`, to be jitted with the state donated.

    The gradient is summed over the M micro-batches and divided once, by the step's whole number of trained tokens:
    how a step is cut into micro-batches changes nothing but memory. A loss or a gradient that is not finite never
    reaches the parameters: adapter and moments stay as they were, and `applied` says so. So they do after a spike,
    where `settings.skip_spikes` is 1, and after a step without a trained token.

    Args:
        decoder: the model.
        dropout: whether adapters' inputs are dropped at `settings.lora_dropout`; False leaves the masks out of the
            program.
    """

    spread = head_spread(decoder.activation_sharding, decoder.spec.vocab_size)
    chunks = chunks_for(decoder.attention.platform, decoder.stacked)

    def objective(adapter, base, anchor, norms, settings, key, rows: Batch):
        lora = variants.applied(adapter, settings.lora_scale, anchor, norms)
        hidden: Any = decoder.apply(
            {"params": base, "lora": lora},
            rows["tokens"],
            rows["positions"],
            rows["segments"],
            lora_dropout=settings.lora_dropout if dropout else None,
            rngs={"dropout": key} if dropout else None,
        )
        total, losses = cross_entropy(
            hidden,
            unembedding(base),
            rows["targets"],
            rows["weights"],
            settings.label_smoothing,
            chunks.size,
            spread,
            chunks.one_pass,
        )
        trained = jnp.maximum(jnp.sum(rows["weights"], axis=-1), 1.0)
        by_row = jnp.sum(losses.nll, axis=-1) / trained
        return total, (jnp.sum(losses.nll), jnp.sum(losses.correct), by_row)

    def step(state: TrainState, base: Mapping[str, Any], batch: Batch) -> tuple[TrainState, StepSums]:
        settings = state.settings
        key = named(jax.random.wrap_key_data(state.key), "dropout", state.step)
        norms = variants.column_norms(base, state.adapter, settings.lora_scale, state.anchor)

        def micro_batch(sums, inputs):
            index, rows = inputs
            (total, (*parts, by_row)), gradient = jax.value_and_grad(objective, has_aux=True)(
                state.adapter, base, state.anchor, norms, settings, jax.random.fold_in(key, index), rows
            )
            return jax.tree.map(jnp.add, sums, (gradient, total, *parts)), by_row

        zero = jnp.zeros((), jnp.float32)
        start = (jax.tree.map(jnp.zeros_like, state.adapter), zero, zero, zero)
        indices = jnp.arange(batch["tokens"].shape[0])
        (gradient, total, nll, correct), rows_nll = jax.lax.scan(micro_batch, start, (indices, dict(batch)))

        weight = jnp.sum(batch["weights"])
        gradient = jax.tree.map(lambda g: g / jnp.maximum(weight, 1.0), gradient)
        norm = optax.tree.norm(gradient)
        loss, some = nll / jnp.maximum(weight, 1.0), weight > 0
        finite = ~some | (jnp.isfinite(total) & jnp.isfinite(norm))
        alarm = spikes.compare(state.recent, loss, norm, settings.spike_threshold)
        spike = some & finite & alarm.spike
        recent = spikes.remember(state.recent, loss, norm, some & finite)
        applied = some & finite & ~(spike & (settings.skip_spikes > 0))
        rate = learning_rate(settings.optimizer, state.step)
        updates, moments = optimizer(settings.optimizer, rate).update(gradient, state.moments, state.adapter)
        adapter = optax.apply_updates(state.adapter, updates)
        adapter, moments = jax.tree.map(
            lambda new, old: jnp.where(applied, new, old), (adapter, moments), (state.adapter, state.moments)
        )
        sums = StepSums(
            objective=total,
            nll=nll,
            correct=correct,
            weight=weight,
            tokens=jnp.sum(batch["segments"] > 0).astype(jnp.float32),
            grad_norm=norm,
            learning_rate=rate,
            finite=finite.astype(jnp.float32),
            spike=spike.astype(jnp.float32),
            loss_deviations=alarm.loss_deviations,
            norm_deviations=alarm.norm_deviations,
            loss_median=alarm.loss_median,
            norm_median=alarm.norm_median,
            first_loss=alarm.first_loss,
            diverged=alarm.diverged.astype(jnp.float32),
            applied=applied.astype(jnp.float32),
            rows_nll=rows_nll,
        )
        after = state._replace(step=state.step + 1, adapter=adapter, moments=moments, recent=recent)
        return after, sums

    return step


def make_eval_step(decoder: Decoder) -> Callable[..., TokenMetrics]:
    """Builds `evaluate(lora, base, batch) -> TokenMetrics`: what all metrics are made of, by token, without a gradient.

    `lora` is the adapter as the decoder reads it, from `lora.variants.effective`; {} for the bare base.
    """

    spread = head_spread(decoder.activation_sharding, decoder.spec.vocab_size)

    def evaluate(lora: Mapping[str, Any], base: Mapping[str, Any], batch: Batch) -> TokenMetrics:
        hidden: Any = decoder.apply(
            {"params": base, "lora": lora}, batch["tokens"], batch["positions"], batch["segments"]
        )
        chunk = chunks_for(decoder.attention.platform, decoder.stacked, evaluating=True).size
        return token_metrics(hidden, unembedding(base), batch["targets"], batch["weights"], chunk, spread)

    return evaluate
