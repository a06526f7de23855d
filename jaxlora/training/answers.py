"""Held-out prompts answered during training, and what is told of the answers."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlora.core.compilation import compiler_options
from jaxlora.core.errors import InputError
from jaxlora.data.chat import ChatEncoder
from jaxlora.data.rows import Conversation, Message
from jaxlora.models.decoder import Decoder
from jaxlora.models.decoding import Sampling, answer_batch, bucket, left_pad
from jaxlora.models.spec import DecoderSpec
from jaxlora.parallel.rows import placed
from jaxlora.parallel.sharding import batch_sharding, cache_sharding, head_spread
from jaxlora.training.metrics import ANSWER_METRICS, Answered


class Answer(NamedTuple):
    """One held-out prompt, answered.

    Attributes:
        prompt: the message that was answered (what came before it was shown to the model too).
        reference: the assistant's turn in the data.
        text: the answer.
        exact: whether text and reference are equal, white space at their ends aside.
        tokens: length of the answer.
        ended: whether it ended by itself, and not at max_new_tokens.
    """

    prompt: str
    reference: str
    text: str
    exact: bool
    tokens: int
    ended: bool


def room_for_prompts(spec: DecoderSpec, max_new_tokens: int) -> int:
    """The longest prompt whose answer, of max_new_tokens, still has positions.

    Raises:
        InputError: there is none.
    """
    limit = spec.max_position_embeddings
    if max_new_tokens >= limit:
        raise InputError(
            f"eval.max_new_tokens = {max_new_tokens} leaves no room for a prompt: the model has {limit} positions; "
            f"set --config.eval.max_new_tokens={limit // 2} or less."
        )
    return limit - max_new_tokens


class AnswerProgram:
    """The program that answers a batch of prompts of one length, greedily; needs neither a prompt nor a tokenizer.

    Args:
        decoder: the model.
        mesh: where base and adapter live.
        length: of the padded prompts, a `decoding.bucket`.
        max_new_tokens: longest answer.
        stop_ids: that end an answer; of a program that is only compiled, their number counts.
    """

    def __init__(
        self, decoder: Decoder, mesh: Mesh, length: int, max_new_tokens: int, stop_ids: Sequence[int] = (0,)
    ):
        self.length, self._mesh = length, mesh
        self._stop_ids = np.asarray(stop_ids, np.int32)
        answer = partial(
            answer_batch,
            decoder,
            max_new_tokens=max_new_tokens,
            cache_sharding=cache_sharding(mesh, decoder.spec.num_kv_heads),
            spread=head_spread(decoder.activation_sharding, decoder.spec.vocab_size),
        )
        options = compiler_options(mesh.devices.flat[0].platform)
        # The answers, small as they are, to every device: each process scores all of them.
        everywhere = NamedSharding(mesh, PartitionSpec())
        self.jitted = jax.jit(answer, out_shardings=everywhere, compiler_options=options)

    def lower(self, lora: Mapping[str, Any], base: Mapping[str, Any], batch_size: int) -> jax.stages.Lowered:
        """Ready to be compiled (it brings its own compiler options).

        Args:
            lora: the adapter as the decoder reads it. base: frozen parameters. Of both, placed shapes are enough.
            batch_size: B.
        """
        rows = batch_sharding(self._mesh, micro_batches=False)
        tokens, numbers = (
            jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
            for shape in ((batch_size, self.length), (batch_size,))
        )
        everywhere = NamedSharding(self._mesh, PartitionSpec())
        rest = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), self._values()
        )
        return self.jitted.lower(base, lora, tokens, numbers, *rest, numbers)

    def rest(self) -> tuple[Any, ...]:
        """Stop ids, sampling and key: what is the same for all batches, placed."""
        everywhere = NamedSharding(self._mesh, PartitionSpec())
        *values, key = self._values()
        key = placed(jax.random.key_data(key), everywhere)
        return *placed(tuple(values), everywhere), jax.random.wrap_key_data(key)

    def _values(self) -> tuple[Any, ...]:
        return self._stop_ids, Sampling(np.float32(0), np.float32(1)), jax.random.key(0)


class Answers:
    """Answers the last assistant turn of held-out conversations, greedily, with one compiled program.

    All batches have one shape: rows in the order of the prompts' lengths, the longest prompt, max_new_tokens. The
    program is compiled by the first answer, or before it by `lower` and `compiled`.

    Args:
        decoder: the model.
        encoder: its template and tokenizer.
        conversations: held-out ones. What follows the last assistant turn is left out; prompts that leave no room for
            max_new_tokens are not answered (see `left_out`).
        max_new_tokens: longest answer.
        batch_size: B, a multiple of the mesh's rows.
        mesh: where base and adapter live.
    Attributes:
        left_out: conversations whose prompt is too long.
        batch_size: B.
    Raises:
        InputError: there is no conversation that can be answered.
    """

    def __init__(
        self,
        decoder: Decoder,
        encoder: ChatEncoder,
        conversations: Sequence[Conversation],
        *,
        max_new_tokens: int,
        batch_size: int,
        mesh: Mesh,
    ):
        room = room_for_prompts(decoder.spec, max_new_tokens)
        prompts = [_split(conversation) for conversation in conversations]
        encoded = [
            (encoder.encode_prompt(before), before[-1]["content"], reference) for before, reference in prompts
        ]
        kept = [item for item in encoded if len(item[0]) <= room]
        self.left_out = len(encoded) - len(kept)
        if not kept:
            raise InputError(
                f"eval.generate: none of the {len(encoded)} held-out prompts leaves room for an answer of "
                f"eval.max_new_tokens = {max_new_tokens} in the model's {room + max_new_tokens} positions; set it "
                "lower, or --config.eval.generate=0."
            )
        self._ids, self._prompts, self._references = zip(*kept, strict=True)
        self._order = np.argsort([len(ids) for ids in self._ids], kind="stable")
        self._tokenizer, self.batch_size, self._mesh = encoder.tokenizer, batch_size, mesh
        length = bucket(max(len(ids) for ids in self._ids))
        self._made = AnswerProgram(decoder, mesh, length, max_new_tokens, encoder.end_of_turn_ids)
        self._program: Callable[..., Any] = self._made.jitted

    def __len__(self) -> int:
        return len(self._ids)

    def lower(
        self, lora: Mapping[str, Any], base: Mapping[str, Any], batch_size: int | None = None
    ) -> jax.stages.Lowered:
        """The program for adapters of this form, ready to be compiled (it brings its own compiler options).

        Args:
            lora, base: as for `answer`, or their placed shapes.
            batch_size: another B than this one's.
        """
        return self._made.lower(lora, base, batch_size or self.batch_size)

    def compiled(self, program: Callable[..., Any], batch_size: int) -> "Answers":
        """The same prompts, answered by a program that came from `lower` for this batch size."""
        made = copy.copy(self)
        made._program, made.batch_size = program, batch_size
        return made

    def answer(
        self,
        lora: Mapping[str, Any],
        base: Mapping[str, Any],
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Answer]:
        """Answers all prompts.

        Args:
            lora: the adapter as the decoder reads it.
            base: frozen parameters.
            progress: called with (answered, all).
        Returns:
            One answer a prompt, in the order of the conversations.
        """
        found: dict[int, Answer] = {}
        rows, count, rest = (
            batch_sharding(self._mesh, micro_batches=False),
            self.batch_size,
            self._made.rest(),
        )
        for start in range(0, len(self), count):
            members = self._order[start : start + count]
            tokens, padding = left_pad([self._ids[i] for i in members], count, self._made.length)
            numbers = np.resize(members, count).astype(np.int32)
            batch = placed((tokens, padding), rows)
            answered = self._program(base, lora, *batch, *rest, placed(numbers, rows))
            ids, lengths, ended = jax.device_get(answered)
            for i, row, length, end in zip(members, ids, lengths, ended, strict=False):
                text = str(self._tokenizer.decode(row[:length].tolist(), skip_special_tokens=True))
                reference = self._references[i]
                exact = text.strip() == reference.strip()
                found[int(i)] = Answer(self._prompts[i], reference, text, exact, int(length), bool(end))
            if progress:
                progress(min(start + count, len(self)), len(self))
        return [found[i] for i in range(len(self))]


def scores(answers: Sequence[Answer], metrics: Sequence[str], pattern: str) -> dict[str, float]:
    """Those of the metrics that are of answers, by the name they are logged under; what says nothing is left out.

    Args:
        pattern: `eval.answer_pattern`.
    """
    found = {name: tuple(column) for name, column in columns(answers).items()}
    answered = Answered(found["reference"], found["text"], found["tokens"], found["ended"], pattern)
    values = {name: ANSWER_METRICS[name](answered) for name in metrics if name in ANSWER_METRICS}
    return {f"eval/{name}": value for name, value in values.items() if value is not None}


def columns(answers: Sequence[Answer]) -> dict[str, list[Any]]:
    """The answers column by column, as a file of eval/ has them."""
    return {name: [getattr(answer, name) for answer in answers] for name in Answer._fields}


def markdown(answers: Sequence[Answer], count: int = 4) -> str:
    """The first few answers as Markdown: the texts are code, so that nothing in them is taken for markup."""
    blocks = []
    for answer in answers[:count]:
        for label in ("prompt", "text", "reference"):
            indented = "\n".join(f"    {line}" for line in getattr(answer, label).split("\n"))
            blocks.append(f"**{'answer' if label == 'text' else label}**\n\n{indented}")
    return "\n\n".join(blocks)


def lines(answers: Sequence[Answer], count: int = 2) -> tuple[str, ...]:
    """The first few answers, a line each."""

    def quoted(text: str, most: int = 60) -> str:
        flat = " ".join(text.split())
        return f'"{flat if len(flat) <= most else flat[: most - 1] + "…"}"'

    return tuple(
        f"  {quoted(a.prompt)} -> {quoted(a.text)} (expected {quoted(a.reference)})" for a in answers[:count]
    )


def _split(conversation: Conversation) -> tuple[list[Message], str]:
    """What comes before the last assistant turn in plain words, and that turn's content."""
    if isinstance(conversation, str):
        raise InputError(
            "eval.generate: the held-out rows are plain text and hold no question; set --config.eval.generate=0, or "
            "give conversations as data.eval."
        )
    spoken = [i for i, m in enumerate(conversation) if m["role"] == "assistant" and "tool_calls" not in m]
    last = max(spoken, default=0)
    if last == 0:
        raise InputError("eval.generate: a held-out conversation has no assistant turn in plain words after a prompt; "
                         "set --config.eval.generate=0, or leave it out of data.eval.")  # fmt: skip
    return conversation[:last], conversation[last]["content"]
