"""What a command is pointed at: a run and one of its adapters, a PEFT folder, or a bare base."""

import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlora.config.load import CommandParser
from jaxlora.config.schema import Config
from jaxlora.core.errors import InputError
from jaxlora.runs.directory import RunDirectory

if (
    TYPE_CHECKING
):  # what is slow to import is imported where it is used, so that wrong input is answered at once
    from jaxlora.config.build.inputs import Model
    from jaxlora.lora.spec import LoraSpec
    from jaxlora.runs.checkpoints import Checkpoints
    from jaxlora.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A base, and the adapter to put on it.

    Attributes:
        model, revision, dtype, quantize, quantize_embeddings: the base, as in a config's `model`.
        description: of both, for a person.
        run, config: where it came from, if from a run.
        folder: the adapter as a PEFT folder, if it is one.
        step: the step of the run that the adapter is from; None when unknown.
        averaged: the steps of the run that the adapter is the mean of, the best first; () for a single one.
    """

    model: str
    revision: str
    dtype: str
    quantize: str
    quantize_embeddings: str
    description: str
    run: RunDirectory | None = None
    config: Config | None = None
    folder: Path | None = None
    step: int | None = None
    averaged: tuple[int, ...] = ()


def add_arguments(parser: CommandParser, dtype: bool = True) -> None:
    """Gives a command --run, --step, --average-best, --adapter, --model and, where the base is computed, --dtype,
    --quantize and --quantize-embeddings."""
    parser.add_argument("--run", type=Path, help="a run's folder: its base, with its adapter")
    parser.add_argument("--step", help="with --run: best, last, or the number of a kept step (best)")
    parser.add_argument(
        "--average-best",
        type=int,
        metavar="K",
        help="with --run: the mean of the adapters of its K best evaluations",
    )
    parser.add_argument("--adapter", type=Path, help="a PEFT adapter folder; its base is the one it names")
    parser.add_argument("--model", help="a base: Hugging Face id or local folder, bare or for --adapter")
    if not dtype:
        parser.set_defaults(dtype=None, quantize=None, quantize_embeddings=None)
        return
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="of the base (a run's own, or bfloat16)"
    )
    parser.add_argument(
        "--quantize",
        choices=("none", "int8", "nf4"),
        help="the base's kernels in 8 or 4 bits (as a run had them, or none)",
    )
    parser.add_argument(
        "--quantize-embeddings",
        choices=("none", "int8", "nf4"),
        help="likewise its embedding and its head",
    )


def choose(arguments: Namespace) -> Chosen:
    """What the arguments of `add_arguments` point at. Looks at a run's small files only.

    Raises:
        InputError: nothing, or more than one thing, was named; or the run has no such adapter.
    """
    if arguments.run is not None:
        for name in ("adapter", "model"):
            if getattr(arguments, name) is not None:
                raise InputError(
                    f"--{name} does not go with --run, which has its own: leave one of them out."
                )
        if arguments.average_best is None:
            return _of_run(arguments.run, arguments.step or "best", arguments)
        if arguments.step is not None:
            raise InputError("--step does not go with --average-best: leave one of them out.")
        return _average_of_run(arguments.run, arguments.average_best, arguments)
    for option, value in (("--step", arguments.step), ("--average-best", arguments.average_best)):
        if value is not None:
            raise InputError(f"{option} goes with --run: leave it out, or name the run.")
    if arguments.adapter is None and arguments.model is None:
        raise InputError("name what is meant: --run FOLDER, --adapter FOLDER or --model FOLDER_OR_ID.")
    quantized = (arguments.quantize or "none", arguments.quantize_embeddings or "none")
    computed = (arguments.dtype or "bfloat16", *quantized)
    if arguments.adapter is None:
        return Chosen(arguments.model, "", *computed, arguments.model)
    from jaxlora.lora.peft import read_config

    config = read_config(arguments.adapter)
    model = arguments.model or config.get("base_model_name_or_path")
    if not model:
        raise InputError(f"the adapter in {arguments.adapter} does not name its base: give it as --model.")
    revision = "" if arguments.model else config.get("revision") or ""
    return Chosen(model, revision, *computed, f"{model} with {arguments.adapter}", folder=arguments.adapter)


def _base_of_run(run: RunDirectory, config: Config, arguments: Namespace) -> tuple[str, str, str, str, str]:
    """Path, revision, dtype and both quantisations of a run's base, all but path and revision as the arguments have
    them."""
    own = config.model
    return (
        own.path,
        _trained_revision(run, config),
        arguments.dtype or own.dtype,
        arguments.quantize or own.quantize,
        arguments.quantize_embeddings or own.quantize_embeddings,
    )


def _of_run(path: Path, step: str, arguments: Namespace) -> Chosen:
    run = RunDirectory.read(path)
    config, record = Config.from_dict(run.config), run.record
    of_base = _base_of_run(run, config, arguments)
    if step not in ("best", "last"):
        if not step.isdecimal():
            raise InputError(f"--step {step}: it is best, last, or the number of a kept step.")
        told = f"{config.model.path} with the adapter of {path} at step {int(step):,}"
        return Chosen(*of_base, told, run, config, step=int(step))
    folder = run.best if step == "best" else run.last
    if not (folder / "adapter_config.json").is_file():
        other = run.last if step == "best" else run.best
        remedy = (
            f"Its other adapter is there: --step {other.name}."
            if (other / "adapter_config.json").is_file()
            else "It appears with the first evaluation or checkpoint; train for longer."
        )
        raise InputError(
            f"{path} has no {step} adapter yet (the run is {record.get('status', 'not begun')}, at step "
            f"{record.get('steps', 0)}).\n{remedy}"
        )
    at = (record.get("best") or {}) if step == "best" else {"step": record.get("steps")}
    known = [f"step {at['step']:,}"] if at.get("step") is not None else []
    known += [f"eval nll {at['eval/nll']:.4f}"] if at.get("eval/nll") is not None else []
    told = ", ".join([f"{config.model.path} with {folder}", *known])
    return Chosen(*of_base, told, run, config, folder, at.get("step"))


def _average_of_run(path: Path, count: int, arguments: Namespace) -> Chosen:
    run = RunDirectory.read(path)
    config = Config.from_dict(run.config)
    bests = [int(best["step"]) for best in run.record.get("bests") or ()]
    # The base before training is an evaluation like others, but no adapter that was trained.
    kept = [step for step in bests if step]
    if not 1 <= count <= len(kept) or bests[:count] != kept[:count]:
        shown = ", ".join(f"{step:,}" for step in kept) or "none"
        raise InputError(
            f"--average-best {count}: {path} keeps the checkpoints of {len(kept)} of its best evaluations (steps "
            f"{shown}); give a number from 1 to that.\nMore are kept by a run with a larger checkpoint.best (this one "
            f"has {config.checkpoint.best})."
        )
    steps = tuple(kept[:count])
    told = (
        f"{config.model.path} with the mean of the adapters of {path} at steps {', '.join(map(str, steps))}"
    )
    return Chosen(*_base_of_run(run, config, arguments), told, run, config, averaged=steps)


def _trained_revision(run: RunDirectory, config: Config) -> str:
    """The commit of the base that the run trained on, which its adapters name: a branch may have moved since."""
    from jaxlora.models.tensors import read_json

    for adapter in (run.best, run.last):
        if (adapter / "adapter_config.json").is_file():
            return read_json(adapter / "adapter_config.json").get("revision") or config.model.revision
    return config.model.revision


def load(chosen: Chosen, model: "Model") -> "tuple[dict[str, Any], LoraSpec] | None":
    """Reads the chosen adapter, from its folder or from the run's checkpoints; None for a bare base.

    Args:
        chosen: from `choose`.
        model: the base that it sits on.
    Returns:
        (adapter, spec): unscaled float32 NumPy arrays and their constants, with one rank (see `variants.ordinary`).
    Raises:
        InputError: no adapter, not one for this base, or a step that is not kept.
    """
    if chosen.folder is not None:
        from jaxlora.lora.peft import load_peft

        return load_peft(chosen.folder, model.spec)
    steps = chosen.averaged or ((chosen.step,) if chosen.step is not None else ())
    if chosen.run is None or chosen.config is None or not steps:
        return None
    from jaxlora.config.build import programs
    from jaxlora.lora.tree import mean
    from jaxlora.lora.variants import ordinary
    from jaxlora.parallel import exchange
    from jaxlora.runs.checkpoints import Checkpoints

    like = programs.state_shapes(chosen.config, model, 1)
    with Checkpoints(chosen.run.checkpoints, read_only=True) as checkpoints:
        states = [_restored(checkpoints, step, like, chosen.run.path) for step in steps]
    # What DoRA and PiSSA start from is the same at every step.
    adapter = mean([exchange.whole(state.adapter) for state in states])
    return ordinary(adapter, programs.lora_spec(chosen.config), exchange.whole(states[0].anchor))


def _restored(checkpoints: "Checkpoints", step: int, like: "TrainState", run: Path) -> "TrainState":
    """The state of a kept step."""
    kept = checkpoints.steps()
    if step not in kept:
        shown = ", ".join(map(str, kept)) or "none"
        raise InputError(f"{run} keeps no checkpoint of step {step}; kept are: {shown} (and best, last).")
    found = checkpoints.restore(like, step)
    if found is None:
        raise InputError(
            f"{'; '.join(checkpoints.skipped)}. Choose another --step of {', '.join(map(str, kept))}."
        )
    return found.state
