"""Whether a run fits its devices: what its works need (see `works`), beside what there is, before the first step."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from jax.sharding import Mesh

from jaxlora.config.build.inputs import HeldOut, Model, offloads, on_gpus
from jaxlora.config.build.programs import Programs
from jaxlora.config.build.works import (
    Answerer,
    Attempt,
    Work,
    answering,
    attempts,
    changed,
    evaluation,
    training,
    works,
)
from jaxlora.config.schema import Config
from jaxlora.core.errors import InputError
from jaxlora.data.batches import EvalBatches
from jaxlora.parallel import sharding
from jaxlora.parallel.capacity import Capacity, capacity, told
from jaxlora.runs.progress import Progress
from jaxlora.training.answers import Answers
from jaxlora.training.state import TrainState

Laid = TypeVar("Laid", bound=HeldOut)


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What a run computes with; it fits.

    Attributes:
        config: the run's, but for eval.batch_size and a model.remat of "auto", which are what fits.
        programs: compiled.
        answers: with their own compiled program; None for none.
        needs: bytes on each device, by what is done.
        capacity: what there is.
    """

    config: Config
    programs: Programs
    answers: Answers | None
    needs: Mapping[str, int]
    capacity: Capacity

    def __str__(self) -> str:
        needs = ", ".join(f"{name} {told(need)}" for name, need in self.needs.items())
        return f"{needs}; a device has {told(self.capacity.size)} ({self.capacity.source})"


class TrainingRefusedError(InputError):
    """Training does not fit.

    Attributes:
        rows: the largest micro-batch that does; None for none.
    """

    def __init__(self, message: str, rows: int | None):
        super().__init__(message)
        self.rows = rows


def fit(
    config: Config, model: Model, state: TrainState, answers: Answers | None, progress: Progress
) -> Fitted:
    """Compiles all that a run computes with, from shapes alone, and compares what it needs with what there is.

    Batches of evaluation and answers that do not fit are halved until they do, which changes nothing but speed, and
    said. Batches of training are the person's: the largest that fits is looked for, and named. Where model.remat is
    "auto", training is compiled with one policy after the other, the fastest first, until one fits.

    Args:
        state: shapes of the train state.
        answers: the prompts to answer, if any.
    Raises:
        InputError: training does not fit, or not even the smallest batch of something else.
    """
    have = capacity(config.mesh.memory_gb, model.mesh.devices.flat)
    config, (train, adapter, *others) = settled(config, model, state, answers, have, progress)
    if not have.holds(train.need) or not have.holds(adapter.need):
        raise training_refused(config, model, train, adapter, have, progress)
    evaluation, *answering = [shrunk(config, model, attempt, have, progress.say) for attempt in others]
    made = [attempt.programs[0] for attempt in (train, adapter, evaluation)]
    if answers is not None:
        answers = answers.compiled(answering[0].programs[0], answering[0].rows)
    needs = {attempt.work.name: attempt.need or 0 for attempt in (train, evaluation, *answering)}
    fitting = changed(config, "eval", batch_size=evaluation.rows)
    return Fitted(fitting, Programs(*made), answers, needs, have)


def settled(
    config: Config,
    model: Model,
    state: TrainState,
    answers: Answerer | None,
    have: Capacity,
    progress: Progress,
) -> tuple[Config, list[Attempt]]:
    """Compiles all that a run does, training with the first policy of model.remat that fits.

    Returns:
        The config with the policy that it came to, and what was compiled, in the order of `works`.
    """
    policy, *slower = policies(config, model.mesh)
    asked, config = config, changed(config, "model", remat=policy)
    train, *others = attempts(model, *works(config, model, state, answers))
    for policy in slower:
        if have.holds(train.need):
            break
        progress.say(f"model.remat = '{config.model.remat}' would take {need(train.need)}")
        config = changed(config, "model", remat=policy)
        with progress.stage(f"compiling training with model.remat = '{policy}'"):
            (train,) = attempts(model, (training(config, model, state), train.rows))
    if asked.model.remat == "auto":
        progress.say(
            f"model.remat = 'auto' is '{config.model.remat}': training takes {need(train.need)}, and a device has "
            f"{told(have.size)} ({have.source})"
        )
    return config, [train, *others]


def policies(config: Config, mesh: Mesh) -> tuple[str, ...]:
    """The values of model.remat to try, the fastest first."""
    if config.model.remat != "auto":
        return (config.model.remat,)
    # The many arrays that "none" keeps cost more than to compute them again: on a CPU in bfloat16 (`core.kept`), and
    # on a GPU, where each has to be written into those of all layers (docs/speed.md).
    if not offloads(mesh):
        return ("dots", "full") if config.model.dtype == "bfloat16" else ("none", "dots", "full")
    if on_gpus(mesh):
        return ("dots", "full", "offload")
    return ("none", "dots", "full", "offload")


class FittedEvaluation(NamedTuple):
    """What evaluates adapters outside of a run; it fits.

    Attributes:
        steps: `(lora, base, batch) -> TokenLosses` for each adapter.
        answers: with a compiled program for each adapter; None for none.
        eval_rows: of a batch.
    """

    steps: list[Callable[..., Any]]
    answers: list[Answers | None]
    eval_rows: int


def fit_evaluation(
    config: Config,
    model: Model,
    loras: Sequence[Mapping[str, Any]],
    answers: Answers | None,
    say: Callable[[str], None],
) -> FittedEvaluation:
    """Likewise for an evaluation: the same programs as in a run, for adapters of each of these forms.

    Args:
        loras: adapters as the decoder reads them, or their placed shapes; {} for the bare base.
        answers: the prompts to answer, if any.
        say: takes a line for the person.
    Raises:
        InputError: not even the smallest batch fits.
    """
    have = capacity(config.mesh.memory_gb, model.mesh.devices.flat)
    wanted = [(evaluation(config, model, loras, 0), config.eval.batch_size)]
    if answers is not None:
        wanted.append((answering(answers, model, loras, 0), answers.batch_size))
    fitting = [shrunk(config, model, attempt, have, say) for attempt in attempts(model, *wanted)]
    compiled: list[Answers | None] = [None] * len(loras)
    if answers is not None:
        compiled = [answers.compiled(program, fitting[1].rows) for program in fitting[1].programs]
    return FittedEvaluation(fitting[0].programs, compiled, fitting[0].rows)


def with_eval_rows(data: Laid, rows: int) -> Laid:
    """The same rows of held-out data in batches of another size."""
    other = {}
    for field in dataclasses.fields(data):
        batches = getattr(data, field.name)
        if isinstance(batches, EvalBatches):
            other[field.name] = copy.copy(batches)
            other[field.name].batch_size = rows
    return dataclasses.replace(data, **other)


def shrunk(
    config: Config, model: Model, asked: Attempt, have: Capacity, say: Callable[[str], None]
) -> Attempt:
    """The attempt, or one with the half, a quarter, ... of its rows."""
    shares, attempt = sharding.row_devices(model.mesh), asked
    while not have.holds(attempt.need):
        rows = max(shares, attempt.rows // 2 // shares * shares)
        if rows == attempt.rows:
            raise InputError(
                f"{attempt.work.name}: even {_rows(rows)} at once takes {need(attempt.need)}, and a device has "
                f"{told(have.size)} ({have.source}).\n{remedy(config, model, attempt.work)}"
            )
        (attempt,) = attempts(model, (attempt.work, rows))
    if attempt is not asked:
        say(
            f"{asked.work.name}: eval.batch_size = {asked.rows} would take {need(asked.need)}, and a device has "
            f"{told(have.size)} ({have.source}): {_rows(attempt.rows)} at once, {need(attempt.need)}, with the same "
            "result"
        )
    return attempt


def largest(
    model: Model, work: Work, sizes: Sequence[int], have: Capacity
) -> tuple[Attempt | None, Attempt | None]:
    """(the largest of some sizes of batch that fits, the smallest that was tried and does not).

    Args:
        sizes: rows, ascending; the smallest is tried first, and where that does not fit, none does.
    """
    best, worst, low, high, at = None, None, 0, len(sizes) - 1, 0
    while low <= high:
        (attempt,) = attempts(model, (work, sizes[at]))
        if have.holds(attempt.need):
            best, low = attempt, at + 1
        else:
            worst, high = attempt, at - 1
        at = (low + high + 1) // 2
    return best, worst


def micro_batches(config: Config, model: Model) -> list[int]:
    """The sizes that train.micro_batch_size may have."""
    shares, rows = sharding.row_devices(model.mesh), config.train.batch_size
    return [n for n in range(shares, rows + 1, shares) if rows % n == 0]


def training_refused(
    config: Config, model: Model, train: Attempt, adapter: Attempt, have: Capacity, progress: Progress
) -> TrainingRefusedError:
    """What to say to somebody whose training does not fit, with the largest micro-batch that would."""
    asked = config.train.micro_batch_size
    smaller = [n for n in micro_batches(config, model) if n < asked] if have.holds(adapter.need) else []
    said = (
        f"train.micro_batch_size = {asked} takes {need(train.need)} of memory, and a device has {told(have.size)} "
        f"({have.source}).\n"
    )
    with progress.stage("looking for the largest train.micro_batch_size that fits"):
        best, worst = largest(model, train.work, smaller, have)
    if best is not None:
        return TrainingRefusedError(
            f"{said}The largest that fits is {best.rows} ({need(best.need)}): set "
            f"--config.train.micro_batch_size={best.rows}. It changes nothing but speed.",
            best.rows,
        )
    even = f"{_rows(worst.rows)} at once takes {need(worst.need)} still. " if worst else ""
    return TrainingRefusedError(f"{said}{even}{remedy(config, model, train.work)}", None)


def remedy(config: Config, model: Model, work: Work) -> str:
    """What helps where no smaller batch does."""
    helps = []
    if work.name == "answers":
        helps = [
            f"a smaller eval.max_new_tokens (it is {config.eval.max_new_tokens})",
            "--config.eval.generate=0",
        ]
    if work.name == "training":
        least = "offload" if offloads(model.mesh) else "full"
        helps += [f"--config.model.remat={least}"] if config.model.remat != least else []
    if config.model.dtype != "bfloat16":
        helps.append("--config.model.dtype=bfloat16")
    if work.name != "answers":
        helps.append(f"a shorter data.max_length (it is {config.data.max_length})")
    if config.mesh.fsdp == 1:
        helps.append("a base that is cut over several devices (--config.mesh.fsdp=-1 --config.mesh.data=1)")
    larger = [key for key in ("quantize", "quantize_embeddings") if getattr(config.model, key) != "nf4"]
    if larger:
        flags = " ".join(f"--config.model.{key}=nf4" for key in larger)
        helps.append(f"{flags}, which is another base (docs/quantised.md)")
    return f"What helps: {', or '.join(helps)}."


def _rows(count: int) -> str:
    return f"{count} row{'s' if count > 1 else ''}"


def need(need: int | None) -> str:
    return "more than the compiler can place" if need is None else told(need)
