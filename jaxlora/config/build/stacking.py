"""What a stack of trials computes with, compiled from shapes, and how many of them fit."""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxlora.config.build import memory, programs, works
from jaxlora.config.build.inputs import Model
from jaxlora.config.build.works import Part, Work
from jaxlora.config.schema import Config
from jaxlora.core.errors import InputError
from jaxlora.parallel import sharding
from jaxlora.parallel.capacity import capacity, told
from jaxlora.parallel.rows import placed
from jaxlora.runs.progress import Progress
from jaxlora.sweeps import stack
from jaxlora.training.answers import Answers
from jaxlora.training.state import TrainState
from jaxlora.training.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Form:
    """What decides about the program of a stack, whoever is in it.

    Attributes:
        config: of any of its trials; they differ in nothing that the program does not take as a number.
        model: the base.
        like: the placed shapes of one state, with the largest ranks.
        own_batches: whether each trial has a batch of its own: where seeds differ, or one may go back.
        dropout: whether any trial drops out.
    """

    config: Config
    model: Model
    like: TrainState
    own_batches: bool
    dropout: bool

    @property
    def key(self) -> Hashable:
        """Equal for forms of one group that have the same program."""
        return (*sorted(stack.ranks_of(self.like).items()), self.own_batches, self.dropout)


@dataclasses.dataclass(frozen=True)
class Fitted:
    """Compiled programs of a stack that fits.

    Attributes:
        form: with the policy of model.remat and the eval.batch_size that fit.
        at_once: so many trials at most.
        train: slots -> the compiled step; compiles what is not there yet.
        programs: of one trial; its `train` is of no use.
        answers: with their compiled program; None for none.
        said: what is needed and what there is, for a person.
    """

    form: Form
    at_once: int
    train: Callable[[int], Callable[..., Any]]
    programs: programs.Programs
    answers: Answers | None
    said: str


def form(configs: Sequence[Config], model: Model, totals: Sequence[int]) -> Form:
    """The form of a stack of trials with these configs and numbers of steps."""
    specs = [programs.lora_spec(config) for config in configs]
    ranks = stack.largest([spec.ranks for spec in specs])
    shapes = programs.state_shapes(configs[0], model, totals[0])
    policies = {policy for config in configs for policy in (config.guard.on_spike, config.guard.on_nonfinite)}
    return Form(
        configs[0],
        model,
        stack.placed_shapes(model.mesh, shapes, ranks),
        own_batches=len({config.seed for config in configs}) > 1 or "rollback" in policies,
        dropout=any(rate for spec in specs for rate in spec.dropouts.values()),
    )


def lower_train(form: Form, count: int) -> jax.stages.Lowered:
    """`step(states, base, batch, active) -> (states, sums)` of `count` slots, ready to be compiled."""
    config, model = form.config, form.model
    mesh = model.mesh
    states = stack.stacked_shapes(mesh, form.like, count)
    decoder = programs.training_decoder(config, model).clone(stacked=True)
    step = make_train_step(decoder, form.dropout)
    batch = _batch_shapes(form, count)
    active = jax.ShapeDtypeStruct((count,), jnp.bool_, sharding=sharding.of_trials(mesh, PartitionSpec()))
    placements = (jax.tree.map(lambda x: x.sharding, states), NamedSharding(mesh, PartitionSpec()))
    several = stack.side_by_side(step, form.own_batches, mesh)
    return jax.jit(several, donate_argnums=0, out_shardings=placements).lower(
        states, model.shapes(), batch, active
    )


def _batch_shapes(form: Form, count: int) -> dict[str, jax.ShapeDtypeStruct]:
    micro, mesh = form.config.train.micro_batch_size, form.model.mesh
    shapes = programs.batch_shapes(form.config, mesh, form.config.train.batch_size // micro, micro)
    if not form.own_batches:
        return shapes
    return {
        name: jax.ShapeDtypeStruct(
            (count, *x.shape), x.dtype, sharding=sharding.of_trials(mesh, x.sharding.spec)
        )
        for name, x in shapes.items()
    }


def put_batches(form: Form, batches: Sequence[Mapping[str, np.ndarray] | None]) -> dict[str, jax.Array]:
    """Places batches [rows, T], one a slot, as [A, M, B, T]; padding for a slot that has none."""
    shapes = _batch_shapes(form, stack.slots(form.model.mesh, len(batches)))
    host = {name: np.zeros(x.shape, x.dtype) for name, x in shapes.items()}
    for slot, batch in enumerate(batches):
        for name in host:
            if batch is not None:
                host[name][slot] = batch[name].reshape(host[name].shape[1:])
    return placed(host, {name: x.sharding for name, x in shapes.items()})


def training(form: Form) -> Work:
    """Training so many trials at once."""

    def lower(count: int) -> list[Part]:
        slots = stack.slots(form.model.mesh, count)
        return [Part(lower_train(form, slots), 2 * works.size_on_device(_batch_shapes(form, slots)))]

    return Work("training", lower)


def fit(form: Form, trials: int, at_once: int, answers: Answers | None, progress: Progress) -> Fitted:
    """Compiles what trials are trained and evaluated with, and finds how many fit at once.

    Args:
        form: of the stack.
        trials: that are to be trained. at_once: at most so many; 0 is as many as fit.
        answers: the prompts to answer, if any.
    Raises:
        InputError: not even one fits, or not so many as at_once says.
    """
    have = capacity(form.config.mesh.memory_gb, form.model.mesh.devices.flat)
    wanted = min(at_once or trials, trials)
    attempt, asked = None, form
    for policy in memory.policies(form.config, form.model.mesh):
        form = dataclasses.replace(form, config=works.changed(form.config, "model", remat=policy))
        with progress.stage(f"compiling training, {_trials(wanted)} at once"):
            (attempt,) = works.attempts(form.model, (training(form), wanted))
        if have.holds(attempt.need):
            break
    assert attempt is not None
    if not have.holds(attempt.need):
        said = f"{_trials(wanted)} at once would take {memory.need(attempt.need)}"
        device = f"a device has {told(have.size)} ({have.source})"
        with progress.stage("looking for the most trials that fit at once"):
            sizes = range(1, wanted) if wanted > 1 else ()
            best, worst = memory.largest(form.model, training(form), sizes, have)
        if best is None:
            need = memory.need((worst or attempt).need)
            raise InputError(
                f"not even one trial fits: it takes {need} to train, and {device}.\n"
                f"{memory.remedy(asked.config, form.model, attempt.work)}"
            )
        if at_once:
            raise InputError(
                f"sweep.at_once = {at_once}: {said}, and {device}.\nSet --config.sweep.at_once={best.rows}, the most "
                "that fit, or 0, which finds it."
            )
        progress.say(f"{said}, and {device}: {best.rows} at once")
        attempt = best
    compiled = {stack.slots(form.model.mesh, attempt.rows): attempt.programs[0]}

    def train(slots: int) -> Callable[..., Any]:
        if slots not in compiled:
            with progress.stage(f"compiling training, {_trials(slots)} at once"):
                (compiled[slots],) = programs.compile_all(form.model, [lower_train(form, slots)])
        return compiled[slots]

    lora = programs.lora_shapes(form.model, form.like)
    batch = works.size_on_device(_batch_shapes(form, stack.slots(form.model.mesh, attempt.rows)))
    states = stack.stacked_shapes(form.model.mesh, form.like, stack.slots(form.model.mesh, attempt.rows))
    beside = batch + works.size_on_device(states)
    adapter = Work(
        "the adapter", lambda _: [Part(programs.lower_effective(form.model, form.like, lora), beside)]
    )
    asked_for = [
        (adapter, 1),
        (works.evaluation(form.config, form.model, [lora], beside), form.config.eval.batch_size),
    ]
    if answers is not None:
        asked_for.append((works.answering(answers, form.model, [lora], beside), answers.batch_size))
    with progress.stage("compiling evaluation and answers"):
        effective, *others = works.attempts(form.model, *asked_for)
        evaluation, *answering = [
            memory.shrunk(form.config, form.model, each, have, progress.say) for each in others
        ]
    if answers is not None:
        answers = answers.compiled(answering[0].programs[0], answering[0].rows)
    needs = ", ".join(
        f"{name} {memory.need(each.need)}"
        for name, each in ((f"training {_trials(attempt.rows)}", attempt), ("evaluation", evaluation))
    )
    return Fitted(
        dataclasses.replace(form, config=works.changed(form.config, "eval", batch_size=evaluation.rows)),
        attempt.rows,
        train,
        programs.Programs(_no_program, effective.programs[0], evaluation.programs[0]),
        answers,
        f"{needs}; a device has {told(have.size)} ({have.source})",
    )


def _no_program(*_: Any) -> Any:
    raise AssertionError("a trial of a stack is not trained by itself")


def _trials(count: int) -> str:
    return f"{count} trial{'s' if count > 1 else ''}"
