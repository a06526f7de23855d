"""What a config's programs would take of its devices: compiled from shapes alone, without weights or data."""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxlora.config.build import dataplan, inputs, memory, programs, works
from jaxlora.config.build.inputs import Model
from jaxlora.config.schema import Config
from jaxlora.core.errors import InputError
from jaxlora.models import flops
from jaxlora.models.decoding import bucket
from jaxlora.parallel import chips
from jaxlora.parallel.capacity import Capacity, capacity, told
from jaxlora.parallel.collectives import collectives, totals
from jaxlora.runs.progress import Progress
from jaxlora.training.answers import AnswerProgram, room_for_prompts

UTILISATIONS = (0.4, 0.5, 0.6)
"""Shares of a chip's peak for which a step's time is given: an estimate, no measurement."""


class Prompts(NamedTuple):
    """Stands in for prompts that are not known yet: so many rows, of the program's length."""

    program: AnswerProgram
    batch_size: int

    def lower(self, lora: Mapping[str, Any], base: Mapping[str, Any], batch_size: int) -> jax.stages.Lowered:
        return self.program.lower(lora, base, batch_size)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program; bytes are those of each device.

    Attributes:
        rows: computed at once.
        arguments, temporaries, outputs: as its compiler says; outputs without those in an argument's place.
        peak: all of it, and what lives beside it (`memory`).
        collectives: bytes that a device receives, by kind; None where a loop's turns depend on the data.
    """

    rows: int
    arguments: int
    temporaries: int
    outputs: int
    peak: int
    collectives: dict[str, float] | None


@dataclasses.dataclass(frozen=True)
class CompilePlan:
    """What the programs of a run would take.

    Attributes:
        device_kind, devices, mesh: what they were compiled for.
        capacity: of each device.
        parameters, trained, optimizer: bytes on each device: base, adapter, and what the optimiser keeps of it.
        programs: by "training", "evaluation", "generation"; what does not fit is left out.
        flops: of a step, over all devices. tokens: in a step, padding too.
        lora_scales: on B A, by projection. smoothing_floor: the least that the objective can be, in nats.
        peak: FLOP/s of a device, None where that is not known.
        largest_micro_batch: that fits; None for none.
        seconds: that lowering and compiling all of it took.
        refusals: why a run would be refused, with the remedy; empty where it fits. remarks: for the person.
    """

    device_kind: str
    devices: int
    mesh: dict[str, int]
    capacity: Capacity
    parameters: int
    trained: int
    optimizer: int
    programs: dict[str, Program]
    flops: flops.Flops
    tokens: int
    lora_scales: dict[str, float]
    smoothing_floor: float
    peak: float | None
    largest_micro_batch: int | None
    seconds: float
    refusals: list[str]
    remarks: list[str]

    @property
    def fits(self) -> bool:
        """Whether a run would start."""
        return not self.refusals

    def step_seconds(self, utilisation: float) -> float | None:
        """An estimate: a step's products at this share of all devices' peak."""
        return self.flops.total / (self.devices * self.peak * utilisation) if self.peak else None

    def json(self) -> dict[str, Any]:
        """All of it, in bytes, FLOP and seconds."""
        plain = dataclasses.asdict(self) | {"fits": self.fits}
        plain["flops"] = {**self.flops._asdict(), "total": self.flops.total, "model": self.flops.model}
        plain["capacity"] = self.capacity._asdict()
        plain["estimated_step_seconds"] = {str(share): self.step_seconds(share) for share in UTILISATIONS}
        return plain


def compile_plan(
    config: Config, devices: Sequence[Any] | None, progress: Progress, search: bool = True
) -> CompilePlan:
    """Compiles the train step, an evaluation batch and a batch of answers.

    Of training, the largest micro-batch that fits is looked for. Evaluation and answers that do not fit are halved, as
    a run would. Prompts are taken to be of data.max_length tokens.

    Args:
        devices: of the mesh, there or described only (`parallel.topology`); None for those at hand.
        search: whether to look for the largest micro-batch.
    Raises:
        InputError: no such model, a mesh or a batch that does not divide, prompts that leave no room for an answer.
    """
    with progress.stage("reading the model's config"):
        model = inputs.model(config, weights=False, devices=devices)
        state = programs.state_shapes(config, model, steps=max(2, config.optim.warmup_steps + 1))
    return plan_of(config, model, state, progress, search)


def plan_of(config: Config, model: Model, state: Any, progress: Progress, search: bool = True) -> CompilePlan:
    """`compile_plan` for a model that was found, and the shapes of its train state."""
    device = model.mesh.devices.flat[0]
    have = capacity(config.mesh.memory_gb, model.mesh.devices.flat)
    refusals: list[str] = []
    remarks: list[str] = []
    prompts, started = _prompts(config, model), time.monotonic()
    with progress.stage("compiling training, evaluation and generation"):
        config, (train, adapter, *others) = memory.settled(config, model, state, prompts, have, progress)
    made = {"training": train}
    largest = train.rows if have.holds(train.need) else None
    if not have.holds(train.need) or not have.holds(adapter.need):
        refused = memory.training_refused(config, model, train, adapter, have, progress)
        refusals.append(str(refused))
        largest = refused.rows
    elif search:
        larger = [rows for rows in memory.micro_batches(config, model) if rows > train.rows]
        with progress.stage("looking for the largest train.micro_batch_size that fits"):
            best, _ = memory.largest(model, train.work, larger, have)
        largest = best.rows if best else largest
    for name, attempt in zip(("evaluation", "generation"), others, strict=True):
        try:
            with progress.stage(f"fitting {name}"):
                made[name] = memory.shrunk(config, model, attempt, have, remarks.append)
        except InputError as error:
            made[name] = attempt
            asked = name == "evaluation" or config.eval.generate
            (refusals if asked else remarks).append(str(error))
    seconds = time.monotonic() - started
    with progress.stage("reading the compiled programs"):
        found = {
            name: _program(attempt, counted=name != "generation")
            for name, attempt in made.items()
            if attempt.programs[0] is not None and attempt.need is not None
        }
    if not config.eval.generate:
        remarks.append("eval.generate is 0: a run would not compile generation")
    chip = chips.find(device.device_kind)
    spec, settings = model.spec, programs.lora_spec(config)
    rows, length = config.train.batch_size, config.data.max_length
    return CompilePlan(
        device_kind=device.device_kind,
        devices=model.mesh.size,
        mesh=dict(model.mesh.shape),
        capacity=have,
        parameters=works.size_on_device(model.shapes()),
        trained=works.size_on_device(state.adapter),
        optimizer=works.size_on_device(state.moments),
        programs=found,
        flops=flops.training(spec, settings.ranks, rows, length, config.model.remat),
        tokens=rows * length,
        lora_scales={name: float(settings.scales[name]) for name in settings.ranks},
        smoothing_floor=dataplan.smoothing_floor(config.optim.label_smoothing, spec.vocab_size),
        peak=chip.peak if chip else None,
        largest_micro_batch=largest,
        seconds=seconds,
        refusals=refusals,
        remarks=remarks,
    )


def _prompts(config: Config, model: Model) -> Prompts:
    new = config.eval.max_new_tokens
    length = min(config.data.max_length, room_for_prompts(model.spec, new))
    return Prompts(AnswerProgram(model.decoder, model.mesh, bucket(length), new), config.eval.batch_size)


def _program(attempt: works.Attempt, counted: bool) -> Program:
    compiled = attempt.programs[0]
    found: Any = compiled.memory_analysis()
    return Program(
        rows=attempt.rows,
        arguments=found.argument_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        outputs=found.output_size_in_bytes - found.alias_size_in_bytes,
        peak=attempt.need or 0,
        collectives=totals(collectives(compiled.as_text())) if counted else None,
    )


# ---- what a person reads ------------------------------------------------------------------------------------------

Rows = list[tuple[str, ...]]


def describe(plan: CompilePlan) -> list[tuple[str, Rows, tuple[str, ...]]]:
    """Tables for a person: (title, rows, header)."""
    names = list(plan.programs)
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    tables: list[tuple[str, Rows, tuple[str, ...]]] = [
        (
            f"memory of each of {plan.devices:,} x {plan.device_kind} ({mesh})",
            [
                ("a device has", f"{told(plan.capacity.size)} ({plan.capacity.source})"),
                ("parameters", told(plan.parameters)),
                ("adapter + optimizer", f"{told(plan.trained)} + {told(plan.optimizer)}"),
                ("largest micro-batch", f"{plan.largest_micro_batch or 'none'}"),
            ],
            (),
        ),
        ("the programs, on each device", _programs(plan, names), ("", *names)),
    ]
    sent = _sent(plan, [name for name in names if plan.programs[name].collectives is not None])
    if sent is not None:
        tables.append(sent)
    return [*tables, ("a step (an estimate: no run was timed)", _time(plan), ())]


def _programs(plan: CompilePlan, names: Sequence[str]) -> Rows:
    made = [plan.programs[name] for name in names]
    return [
        ("rows at once", *(f"{each.rows:,}" for each in made)),
        ("arguments", *(told(each.arguments) for each in made)),
        ("activations (temporaries)", *(told(each.temporaries) for each in made)),
        ("outputs", *(told(each.outputs) for each in made)),
        ("peak", *(told(each.peak) for each in made)),
        ("share of the device", *(f"{each.peak / plan.capacity.size:.0%}" for each in made)),
    ]


def _sent(plan: CompilePlan, names: Sequence[str]) -> tuple[str, Rows, tuple[str, ...]] | None:
    by_name = [plan.programs[name].collectives or {} for name in names]
    kinds = sorted({kind for sent in by_name for kind in sent})
    if not kinds:
        return None
    rows: Rows = [(kind, *(told(round(sent.get(kind, 0))) for sent in by_name)) for kind in kinds]
    rows.append(("in all", *(told(round(sum(sent.values()))) for sent in by_name)))
    return "what a device receives (a step; an evaluation batch)", rows, ("", *names)


def _time(plan: CompilePlan) -> Rows:
    rows: Rows = [
        ("tokens", f"{plan.tokens:,}"),
        (
            "floating-point operations",
            f"{_flop(plan.flops.total)}, {plan.flops.again / plan.flops.total:.0%} of it computed twice",
        ),
    ]
    if plan.peak is None:
        return [*rows, ("time", f"the peak of a {plan.device_kind} is not known")]
    for share in UTILISATIONS:
        seconds = plan.step_seconds(share) or math.inf
        rows.append(
            (
                f"at {share:.0%} of {plan.peak / 1e12:,.0f} TFLOP/s",
                f"{seconds:.3g} s, {plan.tokens / seconds:,.0f} tokens/s",
            )
        )
    return rows


def _flop(count: float) -> str:
    units = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"))
    unit, name = next((pair for pair in units if count >= pair[0]), units[-1])
    return f"{count / unit:,.2f} {name}"
