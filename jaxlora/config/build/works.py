"""What a run does in batches, and what each of it needs on each device.

What a program needs is what its compiler says, on each device: arguments + outputs + temporaries, less the outputs that
take an argument's place. The base and all that the program is given are among its arguments. To that comes what lives
on the device meanwhile without being an argument (see `works`):

    training    the two batches after the one that is computed: one that waits for its turn, one being placed
    adapter     (making it readable for the decoder) the next training batch
    evaluation  the train state, the next training batch, one more eval batch, and one batch's losses being summed
    answers     the train state, the next training batch, and the answers of the batch before

Not counted: what the first state took to make, what the allocator loses between blocks, and, where devices share the
machine's memory, Python and the data.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax

from jaxlora.config.build import programs
from jaxlora.config.build.inputs import Model
from jaxlora.config.schema import Config
from jaxlora.training.state import TrainState


class Answerer(Protocol):
    """Something that answers prompts in batches: `Answers`, or a stand-in for prompts that are not known yet."""

    @property
    def batch_size(self) -> int: ...

    def lower(
        self, lora: Mapping[str, Any], base: Mapping[str, Any], batch_size: int
    ) -> jax.stages.Lowered: ...


def needed(compiled: jax.stages.Compiled) -> int:
    """Bytes that a program holds on each device while it runs, as its compiler says."""
    memory: Any = compiled.memory_analysis()
    if memory is None:  # a backend that does not say
        return 0
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return held + memory.generated_code_size_in_bytes - memory.alias_size_in_bytes


def size_on_device(tree: Any) -> int:
    """Bytes of placed arrays, or of their shapes, on each device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _output(compiled: jax.stages.Compiled) -> int:
    memory: Any = compiled.memory_analysis()
    return 0 if memory is None else memory.output_size_in_bytes


class Part(NamedTuple):
    """A program, and the bytes that live beside it on each device."""

    program: jax.stages.Lowered
    beside: int


@dataclasses.dataclass(frozen=True)
class Work:
    """Something that is done in batches.

    Attributes:
        name: for a person.
        lower: rows of a batch -> its programs.
        outputs: how many more batches' outputs live while one is computed.
    """

    name: str
    lower: Callable[[int], list[Part]]
    outputs: int = 0


class Attempt(NamedTuple):
    """A work's programs, compiled for one size of batch.

    Attributes:
        work, rows: what it was for.
        programs: compiled; None where the compiler ran out of memory.
        need: bytes on each device for the one that needs the most; None where the compiler ran out.
    """

    work: Work
    rows: int
    programs: list[Any]
    need: int | None


def attempts(model: Model, *wanted: tuple[Work, int]) -> list[Attempt]:
    """Compiles works for so many rows each, all at once."""
    parts = [work.lower(rows) for work, rows in wanted]
    compiled = iter(programs.compile_all(model, [part.program for each in parts for part in each]))
    made_of = []
    for (work, rows), each in zip(wanted, parts, strict=True):
        made, needs = [next(compiled) for _ in each], []
        for program, part in zip(made, each, strict=True):
            if program is not None:
                needs.append(needed(program) + part.beside + work.outputs * _output(program))
        made_of.append(Attempt(work, rows, made, max(needs) if len(needs) == len(made) else None))
    return made_of


def training(config: Config, model: Model, state: TrainState) -> Work:
    def lower(rows: int) -> list[Part]:
        other = changed(config, "train", micro_batch_size=rows)
        return [Part(programs.lower_train(other, model, state), 2 * train_batch_size(config, model))]

    return Work("training", lower)


def evaluation(config: Config, model: Model, loras: Sequence[Mapping[str, Any]], beside: int) -> Work:
    def lower(rows: int) -> list[Part]:
        other = changed(config, "eval", batch_size=rows)
        batch = size_on_device(programs.batch_shapes(other, model.mesh, rows))
        return [
            Part(programs.lower_evaluation(other, model, lora), beside + others + batch)
            for lora, others in _each(loras)
        ]

    return Work("evaluation", lower, outputs=1)


def answering(answers: Answerer, model: Model, loras: Sequence[Mapping[str, Any]], beside: int) -> Work:
    def lower(rows: int) -> list[Part]:
        return [
            Part(answers.lower(lora, model.shapes(), rows), beside + others) for lora, others in _each(loras)
        ]

    return Work("answers", lower, outputs=1)


def _each(loras: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], int]]:
    """Each adapter, with the size of the others."""
    sizes = [size_on_device(lora) for lora in loras]
    return [(lora, sum(sizes) - size) for lora, size in zip(loras, sizes, strict=True)]


def train_batch_size(config: Config, model: Model) -> int:
    micro = config.train.micro_batch_size
    return size_on_device(programs.batch_shapes(config, model.mesh, config.train.batch_size // micro, micro))


def changed(config: Config, section: str, **values: Any) -> Config:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def works(
    config: Config, model: Model, state: TrainState, answers: Answerer | None
) -> list[tuple[Work, int]]:
    """What a run does, each with the rows that it asks for: training, making the adapter readable, evaluation, answers.

    Args:
        state: shapes of the train state.
        answers: the prompts to answer, if any.
    """
    lora, beside = programs.lora_shapes(model, state), train_batch_size(config, model)
    adapter = Work("the adapter", lambda _: [Part(programs.lower_effective(model, state, lora), beside)])
    beside_evaluation = beside + size_on_device(state)
    wanted = [
        (training(config, model, state), config.train.micro_batch_size),
        (adapter, 1),
        (evaluation(config, model, [lora], beside_evaluation), config.eval.batch_size),
    ]
    if answers is not None:
        wanted.append((answering(answers, model, [lora], beside_evaluation), answers.batch_size))
    return wanted
