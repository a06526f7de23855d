"""What a config's data would give, from the tokenizer and the data alone: no weights, no decoder, no device."""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedTokenizerBase

from jaxlora.config.build.inputs import Counter, check_positions, data, total_steps
from jaxlora.config.build.programs import lora_spec
from jaxlora.config.schema import Config, OptimConfig
from jaxlora.core.errors import LayoutError
from jaxlora.data.batches import Batches, EvalBatches, encoded_chunks
from jaxlora.data.chat import ChatEncoder, Encoded, load_tokenizer
from jaxlora.data.sources import Source

# JSON leaves these as they are, but terminals obey some and readers of lines end a line at others.
_UNSAFE = re.compile("[\x7f-\x9f\u2028\u2029]")


def encoder(config: Config) -> ChatEncoder:
    """The config's tokenizer and chat template; of a hub id, nothing else is fetched.

    Raises:
        InputError: no such folder or id, or no tokenizer in it.
    """
    tokenizer = load_tokenizer(config.model.path, config.model.revision)
    return ChatEncoder(tokenizer, train_on=config.data.train_on)


# ---- rows ---------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One conversation, whole: before data.max_length, packing and shuffling.

    Attributes:
        where: its file and row, in a person's words.
        turns: of user and assistant; 0 for plain text.
        encoded: its ids, and which of them are trained.
    """

    where: str
    turns: int
    encoded: Encoded

    def json(self, tokenizer: PreTrainedTokenizerBase) -> bytes:
        """A line of JSON: ids, trained (0 or 1 for each), and the text that the ids decode to."""
        ids, trained = self.encoded.ids.tolist(), self.encoded.trained.astype(int).tolist()
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        line = json.dumps({"ids": ids, "trained": trained, "text": text}, ensure_ascii=False)
        return (_UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", line) + "\n").encode()

    def describe(self, max_length: int) -> str:
        """Place and counts, and what data.max_length takes away, in a line for a person."""
        trained = self.encoded.trained
        total, lost = np.count_nonzero(trained), np.count_nonzero(trained[max_length + 1 :])
        facts = [
            f"{self.turns} turns" if self.turns else "plain text",
            f"{len(trained):,} tokens",
            f"{total:,} trained ({total / len(trained):.0%})",
        ]
        line = f"{self.where}: {', '.join(facts)}"
        # Nothing predicts the first id, so a row with no other is as good as empty.
        if not trained[1 : max_length + 1].any():
            return f"{line}; dropped: nothing trained is left within data.max_length {max_length:,}"
        return (
            f"{line}; cut at data.max_length {max_length:,}: {lost:,} trained tokens lost" if lost else line
        )


def rows(source: Source, encoder: ChatEncoder, progress: Counter | None = None) -> Iterator[Row]:
    """All conversations of a source, in its order.

    Raises:
        InputError: a row that cannot be read, rendered or trained on, named by file and row number.
    """
    for start, chunk in encoded_chunks(source, encoder):
        conversations = source.conversations(start, start + len(chunk))
        for i, (conversation, encoded) in enumerate(zip(conversations, chunk, strict=True), start):
            roles = [] if isinstance(conversation, str) else [message["role"] for message in conversation]
            yield Row(source.where(i), sum(role != "system" for role in roles), encoded)
        if progress is not None:
            progress(start + len(chunk), len(source))


# ---- summary ------------------------------------------------------------------------------------------------------


class Summary(NamedTuple):
    """What a run would make of the data.

    Attributes:
        found: what was recognised, a line a data set.
        counts: (label, of data.train, of the held-out data).
        run: (label, value) of the schedule and the adapter; empty when there can be no run.
        refusals: why a run would not start.
        figures: the same as numbers, for JSON.
    """

    found: list[str]
    counts: list[tuple[str, str, str]]
    run: list[tuple[str, str]]
    refusals: list[str]
    figures: dict[str, Any]

    def json(self) -> dict[str, Any]:
        """What JSON can hold of it."""
        return {"found": self.found, **self.figures, "refusals": self.refusals}


def summary(config: Config, encoder: ChatEncoder, progress: Counter | None = None) -> Summary:
    """Encodes and lays out all the data, as training would.

    Raises:
        InputError: data that cannot be read or trained on. What merely does not fit the config is among the refusals.
    """
    found: list[str] = []
    refusals: list[str] = []
    model = model_config(config)
    try:
        if isinstance(positions := model.get("max_position_embeddings"), int):
            check_positions(config, positions)
    except LayoutError as error:
        refusals.append(str(error))
    try:
        laid_out = data(config, encoder, found.append, progress)
    except LayoutError as error:
        return Summary(found, [], [], [*refusals, str(error)], {})
    descriptions = [f"data.train: {laid_out.train_source.description}"]
    if config.data.eval:
        descriptions.append(f"data.eval: {laid_out.eval_source.description}")
    else:
        descriptions.append(f"held out: data.eval_fraction {config.data.eval_fraction:g} of data.train")
    columns = zip(_counts(laid_out.train), _counts(laid_out.eval), strict=True)
    counts = [(label, train, held_out) for (label, train), (_, held_out) in columns]
    figures = {"train": count(laid_out.train), "eval": count(laid_out.eval)}
    try:
        steps = total_steps(config, laid_out.train)
        run = _run(config, laid_out.train, steps)
        figures["run"] = run_figures(config, laid_out.train, steps)
    except LayoutError as error:
        run = []
        refusals.append(str(error))
    run.append(("LoRA scale", scale(config)))
    if config.optim.label_smoothing:
        run.append(("label smoothing", _smoothing(config.optim.label_smoothing, model, encoder)))
    return Summary(descriptions, counts, run, refusals, figures)


def count(batches: Batches | EvalBatches) -> dict[str, int | float]:
    """What there is of some data, in numbers; `filled` is the share of the rows that is not padding."""
    examples = batches.examples
    return {
        "conversations": examples.conversations,
        "truncated": examples.truncated,
        "dropped": examples.dropped,
        "examples": len(examples),
        "tokens": int(examples.tokens),
        "trained_tokens": int(examples.trained_tokens),
        "longest": int(examples.lengths.max()) + 1,
        "rows": len(batches.rows),
        "row_length": batches.max_length,
        "filled": float(batches.efficiency),
        "batches": batches.steps_per_epoch if isinstance(batches, Batches) else batches.num_batches,
        "batch_size": batches.batch_size,
    }


def run_figures(config: Config, train: Batches, steps: int) -> dict[str, Any]:
    """What a run of so many steps comes to."""
    earliest = earliest_stop(config, steps, train.steps_per_epoch)
    return {
        "steps": steps,
        "steps_per_epoch": train.steps_per_epoch,
        "epochs": steps / train.steps_per_epoch,
        "warmup_steps": config.optim.warmup_steps,
        "warmup_share": config.optim.warmup_steps / steps,
        "decay_budget": decay_budget(config.optim, steps),
        "evaluations": evaluations(config, steps, train.steps_per_epoch),
        "earliest_stop": None if earliest is None else {"evaluations": earliest[0], "step": earliest[1]},
    }


def eval_every(config: Config, steps_per_epoch: int) -> float:
    """Steps between evaluations (with eval.adaptive, at most)."""
    chosen = config.eval
    return max(1.0, chosen.every_epochs * steps_per_epoch) if chosen.every_epochs else float(chosen.every)


def evaluations(config: Config, steps: int, steps_per_epoch: int) -> int:
    """Evaluations of a run, at its longest stretches: before the first step, in between, and after the last."""
    every = eval_every(config, steps_per_epoch)
    return 1 + math.ceil(steps / every - 1e-9)


def earliest_stop(config: Config, steps: int, steps_per_epoch: int) -> tuple[int, int] | None:
    """(evaluations made, step) where stop.patience could end a run first: one in which nothing ever improves.

    The evaluation before the first step is the reference. Those before stop.min_steps do not count against it; nor
    does the one after the last step, which ends the run anyway. None where no run can be stopped.
    """
    chosen, every = config.stop, eval_every(config, steps_per_epoch)
    if chosen.patience is None:
        return None
    least = config.optim.warmup_steps if chosen.min_steps is None else chosen.min_steps
    before = max(
        0, math.ceil(least / every - 1e-9) - 1
    )  # evaluations after the first one and before min_steps
    number = before + chosen.patience
    step = math.ceil(number * every - 1e-9)
    return (number + 1, step) if step < steps else None


def _counts(batches: Batches | EvalBatches) -> Iterator[tuple[str, str]]:
    examples = batches.examples
    trained = examples.trained_tokens
    yield "conversations", f"{examples.conversations:,}"
    yield "cut at data.max_length", f"{examples.truncated:,}"
    yield "dropped there", f"{examples.dropped:,}"
    yield "examples", f"{len(examples):,}"
    yield "tokens", f"{examples.tokens:,}"
    yield "trained tokens", f"{trained:,} ({trained / examples.tokens:.1%})"
    yield "longest", f"{examples.lengths.max() + 1:,}"
    yield f"rows of {batches.max_length:,}", f"{len(batches.rows):,} ({batches.efficiency:.1%} filled)"
    steps = batches.steps_per_epoch if isinstance(batches, Batches) else batches.num_batches
    yield "batches", f"{steps:,} of {batches.batch_size:,} rows"


def _run(config: Config, train: Batches, steps: int) -> list[tuple[str, str]]:
    optim, epochs = config.optim, steps / train.steps_per_epoch
    shrinks = f"{100 * decay_budget(optim, steps):.2g}%"
    if optim.loraplus_lr_ratio != 1:
        # What LoRA+ trains faster decays faster.
        faster = dataclasses.replace(optim, learning_rate=optim.learning_rate * optim.loraplus_lr_ratio)
        shrinks += f" (B by {100 * decay_budget(faster, steps):.2g}%)"
    return [
        ("steps", f"{steps:,} ({epochs:.3g} epochs of {train.steps_per_epoch:,})"),
        ("warmup", f"{optim.warmup_steps:,} steps ({optim.warmup_steps / steps:.1%} of the run)"),
        (
            "learning rate",
            f"{optim.learning_rate:g}, then {optim.schedule} to {optim.final_fraction:.0%} of it",
        ),
        ("weight decay", f"{optim.weight_decay:g}: shrinks a weight by {shrinks} over the run"),
        ("evaluations", f"{evaluations(config, steps, train.steps_per_epoch):,}"),
        ("early stop", _patience(config, steps, train.steps_per_epoch)),
    ]


def _patience(config: Config, steps: int, steps_per_epoch: int) -> str:
    if config.stop.patience is None:
        return "never (stop.patience is None)"
    patience = f"stop.patience {config.stop.patience}"
    earliest = earliest_stop(config, steps, steps_per_epoch)
    if earliest is None:
        return f"cannot happen: the run is too short for {patience}"
    return (
        f"not before step {earliest[1]:,}, the {earliest[0]:,}th evaluation ({patience}, nothing ever better)"
    )


def scale(config: Config) -> str:
    """The scale on B A, and what it is made of."""
    spec = lora_spec(config)
    form = "rank {}" if spec.scaling == "alpha/r" else "sqrt(rank {})"
    found: dict[int, list[str]] = {}
    for name, rank in spec.ranks.items():
        found.setdefault(rank, []).append(name)
    return "; ".join(
        f"{spec.scales[names[0]]:.4g} (alpha {spec.alpha:g} / {form.format(rank)}"
        + (f": {', '.join(names)})" if len(found) > 1 else ")")
        for rank, names in found.items()
    )


def _smoothing(smoothing: float, model: Mapping[str, Any], encoder: ChatEncoder) -> str:
    # The embedding may have more rows than the tokenizer has words, and the smoothing spreads over all of them.
    size, origin = model.get("vocab_size"), "of config.json"
    if not isinstance(size, int) or size < 1:
        size, origin = len(encoder.tokenizer), "of the tokenizer"
    return (
        f"{smoothing:g} over {size:,} words ({origin}): the objective cannot fall below "
        f"{smoothing_floor(smoothing, size):.3f} nats; nll is never smoothed"
    )


def model_config(config: Config) -> dict[str, Any]:
    """The base's config.json, or {} where there is none to be read: the data needs none."""
    folder = Path(config.model.path).expanduser()
    file = folder / "config.json"
    if not folder.is_dir():
        cached = try_to_load_from_cache(
            config.model.path, "config.json", revision=config.model.revision or None
        )
        if not isinstance(cached, str):
            return {}
        file = Path(cached)
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def decay_budget(optim: OptimConfig, steps: int) -> float:
    """`training.optimizer.decay_budget` without a device, from the sum of the schedule's rates in closed form.

    peak * ((W - 1) / 2 + n f + (1 - f) (n + 1) / 2)  for W warmup steps, n = steps - W after them, and a final
    fraction f: over its n steps the cosine itself adds up to 1, its first value, since the others cancel in pairs.
    """
    after = steps - optim.warmup_steps
    rising = max(0, optim.warmup_steps - 1) / 2
    falling = after * optim.final_fraction + (1 - optim.final_fraction) * (after + 1) / 2
    return -math.expm1(-optim.weight_decay * optim.learning_rate * (rising + falling))


def smoothing_floor(smoothing: float, vocabulary: int) -> float:
    """The least that a label-smoothed loss can be, in nats: the entropy of its target distribution.

    With q = s / V on each wrong word and p = 1 - s + s / V on the right one: -p ln p - (V - 1) q ln q.
    """
    if not smoothing:
        return 0.0
    wrong = smoothing / vocabulary
    right = 1 - smoothing + wrong
    return -right * math.log(right) - (vocabulary - 1) * wrong * math.log(wrong)
