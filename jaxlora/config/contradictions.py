"""Keys that contradict each other: each is allowed by itself, together they ask for what cannot be."""

from typing import TYPE_CHECKING

from jaxlora.core.errors import InputError
from jaxlora.training.metrics import ANSWER_METRICS, METRICS

if TYPE_CHECKING:
    from jaxlora.config.schema import Config


def check(config: "Config") -> None:
    """Refuses a config whose keys contradict each other.

    Raises:
        InputError: naming the keys, their values and a remedy.
    """
    _steps(config)
    _evaluations(config)
    _guard(config)
    _mesh(config)


def _steps(config: "Config") -> None:
    train, optim = config.train, config.optim
    if train.batch_size % train.micro_batch_size:
        divisors = [n for n in range(1, train.batch_size + 1) if train.batch_size % n == 0]
        near = sorted(sorted(divisors, key=lambda n: abs(n - train.micro_batch_size))[:2])
        raise InputError(
            f"train.batch_size = {train.batch_size} is not divisible by train.micro_batch_size = "
            f"{train.micro_batch_size}.\nA step is made of whole micro-batches: set train.micro_batch_size to "
            f"{' or '.join(map(str, near))}."
        )
    if train.max_steps and optim.warmup_steps >= train.max_steps:
        raise InputError(
            f"optim.warmup_steps = {optim.warmup_steps}, but the run ends after train.max_steps = "
            f"{train.max_steps}: it would never reach its learning rate.\n"
            f"Set optim.warmup_steps below {train.max_steps}, for example "
            f"--config.optim.warmup_steps={train.max_steps // 10}."
        )
    if train.max_steps and config.stop.min_steps is not None and config.stop.min_steps >= train.max_steps:
        raise InputError(
            f"stop.min_steps = {config.stop.min_steps}, but the run ends after train.max_steps = {train.max_steps}: "
            f"it could never stop early.\nSet stop.min_steps below {train.max_steps}, or stop.patience to None."
        )


def _mesh(config: "Config") -> None:
    rest = [name for name in ("trial", "data", "fsdp", "tensor") if getattr(config.mesh, name) == -1]
    if len(rest) > 1:
        raise InputError(
            f"{' and '.join(f'mesh.{name}' for name in rest)} are -1: only one axis can take all the rest.\n"
            f"Give the others a size, for example --config.mesh.{rest[-1]}=1."
        )


def _evaluations(config: "Config") -> None:
    """What best, stop and the schedule read has to be there."""
    eval, stop = config.eval, config.stop
    for key, name in (("checkpoint.best_by", config.checkpoint.best_by), ("stop.by", stop.by)):
        name = name.removeprefix("eval/")
        if "/" in name:  # by source or by turn: which there are is known with the data
            continue
        computed = [n for n in eval.metrics if n in METRICS or eval.generate]
        if name in ANSWER_METRICS and name in eval.metrics and not eval.generate:
            raise InputError(
                f"{key} = '{name}' is a metric of answers, and none are generated: set --config.eval.generate=64, "
                "for example."
            )
        if name not in computed:
            raise InputError(
                f"{key} = '{name}' is not computed: it must be one of {', '.join(computed)}.\n"
                f"Set it with --config.{key}=nll, or add the metric to eval.metrics."
            )
    if stop.min_delta_unit == "standard_errors" and stop.by.removeprefix("eval/") != "nll":
        raise InputError(
            f"stop.min_delta_unit = 'standard_errors' is of nll's paired differences, and stop.by = '{stop.by}'.\n"
            "Set --config.stop.min_delta_unit=absolute, or --config.stop.by=nll."
        )
    if eval.finest and not eval.adaptive:
        raise InputError(
            f"eval.finest = {eval.finest} goes with eval.adaptive: set --config.eval.adaptive=true, or leave it out."
        )
    if eval.adaptive and not eval.every_epochs and eval.finest > eval.every:
        raise InputError(
            f"eval.finest = {eval.finest} is more than eval.every = {eval.every}, the longest stretch between "
            f"evaluations: set it to {eval.every} or less."
        )


def _guard(config: "Config") -> None:
    """Policies that contradict each other."""
    guard = config.guard
    severity = ("log", "skip", "rollback", "stop")
    if severity.index(guard.on_nonfinite) < severity.index(guard.on_spike):
        raise InputError(
            f"guard.on_spike = '{guard.on_spike}' but guard.on_nonfinite = '{guard.on_nonfinite}': a loss that is no "
            f"number would be taken more lightly than a large one.\nSet --config.guard.on_nonfinite={guard.on_spike}."
        )
    for policy, key in (("rollback", "max_rollbacks"), ("skip", "max_skipped")):
        keys_of_policy = [name for name in ("on_spike", "on_nonfinite") if getattr(guard, name) == policy]
        if keys_of_policy and not getattr(guard, key):
            raise InputError(
                f"guard.{keys_of_policy[0]} = '{policy}' and guard.{key} = 0 contradict each other: the first "
                f"would end the run.\nSet guard.{key} to 1 or more, or --config.guard.{keys_of_policy[0]}=stop."
            )
