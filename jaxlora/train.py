"""Fine-tune one adapter: python -m jaxlora.train --config configs/quickstart.py"""

import contextlib
import dataclasses
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlora.config.load import (
    CommandParser,
    add_config_argument,
    changed_config,
    config_name,
    load_config,
    parse_arguments,
)
from jaxlora.config.profiled import check_ahead, steps_of
from jaxlora.config.schema import Config
from jaxlora.core import cli
from jaxlora.core.errors import InputError
from jaxlora.parallel import launch
from jaxlora.runs.directory import ENDED, RunDirectory

if TYPE_CHECKING:  # what is slow to import is imported where it is used, so that --help answers at once
    from jaxlora.config.build.inputs import Data, Model
    from jaxlora.lora.spec import LoraSpec
    from jaxlora.parallel.watch import Watch
    from jaxlora.runs.checkpoints import Checkpoints
    from jaxlora.runs.progress import Progress
    from jaxlora.training.state import TrainState


def main(argv: Sequence[str]) -> int:
    parser = CommandParser(
        prog="python -m jaxlora.train",
        description="Fine-tune a LoRA adapter. The same command with the same --workdir goes on where it stopped; so "
        "does --workdir alone,\nby the config in that folder.",
    )
    add_config_argument(parser, required=False)
    parser.add_argument(
        "--workdir", type=Path, help="the run's folder (default: runs/<MonDD_HH-MM-SS>_<config>)"
    )
    parser.add_argument(
        "--profile", metavar="START:END", help="trace these steps, both included, for xprof (docs/profile.md)"
    )
    launch.add_arguments(parser)
    arguments, overrides = parse_arguments(parser, argv)
    config = _config(arguments.config, arguments.workdir, overrides)
    traced = steps_of(arguments.profile) if arguments.profile else range(0)
    typed = [*overrides, *launch.typed(arguments)]
    started = launch.of(arguments, os.environ)
    return fine_tune(config, arguments.workdir, arguments.config, typed, started, traced)


def _config(argument: str | None, workdir: Path | None, overrides: Sequence[str]) -> Config:
    """The config that was named, or that of the run in the folder.

    Raises:
        InputError: neither was given, or what `load_config` raises.
    """
    if argument is not None:
        return load_config(argument, overrides)
    if workdir is None:
        raise InputError(
            "which config? Give --config FILE.py for a new run, or --workdir FOLDER alone to go on with the run there."
        )
    return changed_config(RunDirectory.read(workdir).config, overrides)


def fine_tune(
    config: Config,
    workdir: Path | None,
    config_argument: str | None,
    overrides: Sequence[str] = (),
    started: launch.Launch | None = None,
    traced: range = range(0),
) -> int:
    """Runs one fine-tuning from config to adapter.

    Args:
        config: the run.
        workdir: its folder, or None for a new one named by the time.
        config_argument, overrides: what was typed, for the commands that are printed; None: the folder's own config.
        started: as one of several processes; None where neither flags nor environment say so.
        traced: steps to profile.
    Returns:
        The exit code: 0 when finished, stopped early, diverged (as far as a run can) or saved on request; 1 when the
        disk did not take what came of it.
    """
    from jaxlora.runs.progress import Progress

    if config.mesh.trial != 1:
        raise InputError(
            f"mesh.trial = {config.mesh.trial} spreads the trials of a sweep over devices, and this is a run alone.\n"
            "Set --config.mesh.trial=1; mesh.data, mesh.fsdp and mesh.tensor share out its rows and matrices."
        )
    launch.keep_stdout(started)
    with Progress() as progress, contextlib.ExitStack() as stack:
        with progress.stage("starting JAX"):
            from jaxlora.config.build import several
            from jaxlora.core.compilation import use_persistent_cache
            from jaxlora.parallel import exchange, processes

            notify = processes.join(progress.say, started)
            watch = processes.watch(started)
        if watch:
            watch.tidy = progress.close
            stack.enter_context(watch.together())
        if not exchange.first():
            progress.mute()
        several.check_same(config)
        named = [] if config_argument is None else ["--config", config_argument]
        path = several.run_path(workdir, config_name(config_argument) if config_argument else "")
        arguments = [*named, *overrides, "--workdir", str(path)]
        command = f"python -m jaxlora.train {shlex.join(arguments)}"
        # An existing folder is looked at before anything slow: it may hold another run, or a finished one.
        run = several.existing_run(path, config)
        if run and run.record.get("status") in ENDED:
            progress.say(f"{path}: this run has ended ({run.record['status']}: {run.record.get('reason')})")
            if run.writes:
                _tell_outcome(run, progress, command)
            return cli.EXIT_OK
        use_persistent_cache()
        return _fine_tune(config, path, run, progress, command, notify, watch, traced)


def _fine_tune(
    config: Config,
    path: Path,
    run: "RunDirectory | None",
    progress: "Progress",
    command: str,
    notify: Callable[[], None] | None,
    watch: "Watch | None",
    traced: range,
) -> int:
    """Args: `run` where the folder is there; `notify` of `processes.join`; `watch` over other processes."""
    with progress.stage("looking for the devices"):
        import jax

        from jaxlora.config.build import inputs, memory, programs, running, several, wiring
        from jaxlora.parallel import exchange
        from jaxlora.runs.checkpoints import Checkpoints
        from jaxlora.runs.writers import Writers
        from jaxlora.training.loop import Program, train
        from jaxlora.training.profiling import Profile

        jax.devices()

    # ---- what is wrong with the input shows here, before there is a folder or a long wait
    model = inputs.model(config)
    given = programs.given_adapter(config, model)
    with progress.stage("reading the data") as stage:
        data = inputs.data(config, inputs.encoder(model, config.data.train_on), progress.say, stage)
    model = inputs.knowing_rows(model, config, data.train.examples, data.eval.examples)
    total = inputs.total_steps(config, data.train)
    check_ahead(traced, 0, total)
    wiring.check_names(config, data)
    answers = wiring.answers(config, model, data, progress.say)
    facts = wiring.facts(config, model, data)
    exchange.agreed("data", facts["data"])
    if run:
        running.check_same_data(run, facts["data"])
    progress.total_steps = total

    # ---- compile, and refuse what does not fit, before the base is loaded
    with progress.stage("compiling training, evaluation and answers"):
        shapes = programs.state_shapes(config, model, total)
        fitted = memory.fit(config, model, shapes, answers, progress)
    compiled, answers = fitted.programs, fitted.answers
    data = memory.with_eval_rows(data, fitted.config.eval.batch_size)
    with progress.stage("loading the base") as stage:
        base = inputs.base(model, stage)

    def first_state() -> "TrainState":
        return programs.first_state(config, model, total, base, given)

    with progress.stage("making the adapter"):
        state = first_state()

    run = run or several.open_run(path, config)
    if watch:
        watch.outlook = several.outlook(run)
    with run, Checkpoints(run.checkpoints, config.checkpoint.keep) as checkpoints, Writers(run) as writers:
        state, standing = running.gone_on(run, checkpoints, state, progress.say)
        check_ahead(traced, int(state.step), total)

        # ---- train
        _tell_plan(config, model, data, state, total, str(fitted), path, command, progress)
        score = wiring.scorer(fitted.config, model, data, compiled, base, progress)
        evaluator = wiring.evaluator(config, score, compiled.effective, base, answers, progress)
        ready = running.wired(
            config, model, data, total, run, writers, checkpoints, standing, facts, evaluator, first_state, progress
        )  # fmt: skip
        recorder = ready.recorder
        if watch:
            watch.on_end = lambda reason: recorder.record("failed", reason)
        with _leaving_on_request(progress, notify, checkpoints, int(state.step)) as asked:
            mine = traced if exchange.first() else range(0)
            profile = Profile(mine, run.tensorboard, progress.say, progress.stage)
            program = Program(compiled.train, base, ready.batch, ready.rollback, profile, profile.seen)
            progress.begin(int(state.step))
            try:
                with profile.open():
                    state, end = train(
                        program, dataclasses.replace(ready.course, asked_to_leave=asked), state
                    )
            except BaseException as error:
                recorder.record("failed", f"{type(error).__name__}: {error}".splitlines()[0])
                raise
            progress.finish()
            with progress.stage("writing the last checkpoint"):
                checkpoints.wait()
        recorder.record(end.status, end.reason, int(state.step))
        progress.say(f"{end.status.replace('_', ' ')}: {end.reason}")
        if run.writes:
            _tell_outcome(run, progress, command)
        lost: list[Any] = recorder.unwritten()
        if end.status == "preempted" and int(state.step) not in checkpoints.steps():
            lost.append(f"the checkpoint of step {int(state.step)}")
        if lost:
            progress.say(
                f"not written: {', '.join(map(str, lost))}.\nMake room, and repeat the command: it goes on after the "
                "newest whole checkpoint."
            )
        return exchange.from_first(lambda: cli.EXIT_FAILED if lost else cli.EXIT_OK)


@contextmanager
def _leaving_on_request(
    progress: "Progress", notify: Callable[[], None] | None, checkpoints: "Checkpoints", first: int
) -> Iterator[Callable[[int], bool]]:
    """While open, SIGTERM and SIGINT ask the run to save and end, see `cli.leaving_on_request`.

    Args:
        notify: of `processes.join`: where several processes may train together, a request goes out to all of them, and
            Orbax says after which step all leave.
        first: the step the loop begins after.
    Returns:
        Takes the number of each step; whether to leave after it.
    """
    if notify:
        checkpoints.reached_preemption(
            first
        )  # the step to leave after is counted from the last one asked about
    with cli.leaving_on_request(progress.say, notify or (lambda: None)) as asked:
        yield checkpoints.reached_preemption if notify else lambda _: asked()


# ---- what a person reads ------------------------------------------------------------------------------------------


def _tell_plan(
    config: Config,
    model: "Model",
    data: "Data",
    state: "TrainState",
    total: int,
    memory: str,
    path: Path,
    command: str,
    progress: "Progress",
) -> None:
    """The summary before training."""
    from jaxlora.config.build import programs, wiring
    from jaxlora.core.tree import count
    from jaxlora.training.optimizer import decay_budget

    trained, frozen = count(state.adapter), count(model.shapes())
    train, optim = data.train, config.optim
    devices = model.mesh.devices
    mesh = ", ".join(f"{axis} {size}" for axis, size in model.mesh.shape.items())
    stop = config.stop.patience
    spec = programs.lora_spec(config)
    rows = [
        ("run folder", path),
        (
            "model",
            f"{config.model.path} ({model.spec.model_type}, {frozen / 1e6:,.1f} M parameters, {config.model.kept})",
        ),
        (
            "adapter",
            f"{_adapter(spec)}: {trained:,} trainable parameters ({trained / frozen:.2%})",
        ),
        ("devices", f"{devices.size} x {devices.flat[0].device_kind} (mesh: {mesh})"),
        ("memory", memory),
        (
            "data",
            f"{len(train.examples):,} examples in {len(train.rows):,} rows of {config.data.max_length} "
            f"({train.efficiency:.0%} filled); {len(data.eval.examples):,} held out",
        ),
        (
            "steps",
            f"{total:,} of {config.train.batch_size} rows ({config.train.micro_batch_size} at once); "
            f"{train.steps_per_epoch:,} an epoch; {wiring.calendar(config, data, total)}",
        ),
        (
            "learning rate",
            f"{optim.learning_rate:g} after {optim.warmup_steps:,} steps of warmup "
            f"({optim.warmup_steps / total:.0%} of the run), then {optim.schedule}",
        ),
        (
            "weight decay",
            f"{optim.weight_decay:g}: shrinks a weight by {decay_budget(state.settings.optimizer):.2%} over the run",
        ),
        ("early stop", f"after {stop} evaluations without improvement" if stop else "off"),
        ("to go on", f"{command} (should it be interrupted)"),
    ]
    progress.table("what will be done", rows)


def _adapter(spec: "LoraSpec") -> str:
    """ "rank 16 on q_proj, v_proj, scale 2", by module where they differ."""
    named = ", ".join(
        f"{name} (rank {rank}, scale {spec.scales[name]:.3g})" if spec.rank_pattern else name
        for name, rank in spec.ranks.items()
    )
    kind = "DoRA of " if spec.use_dora else ""
    return (
        f"{kind}rank by module: {named}"
        if spec.rank_pattern
        else f"{kind}rank {spec.rank} on {named}, scale {spec.scale:g}"
    )


def _tell_outcome(run: "RunDirectory", progress: "Progress", command: str) -> None:
    """The summary after training, from the run's folder alone."""
    record = run.record
    best, first, last = (record.get(key) for key in ("best", "first", "last"))
    rows: list[tuple[str, Any]] = [
        ("steps", f"{record.get('steps', 0):,} in {record.get('seconds', 0):,.0f} s")
    ]
    if first and last:
        rows.append(("eval nll before", _nll(first)))
        rows.append(
            ("eval nll at best", f"{_nll(best)} (step {best['step']:,})" if best else "none is finite")
        )
        rows.append(("eval nll at last", f"{_nll(last)} (step {last['step']:,})"))
    if best:
        others = [name for name in best if name not in ("step", "eval/nll")]
        rows += [(f"{name} at best", f"{best[name]:.4g} (step {best['step']:,})") for name in others]
    if alarm := record.get("overfit"):
        rows.append(
            ("overfitting", f"since step {alarm['since']:,}; eval nll rose by {alarm['eval_rise']:.4f}")
        )
    if spikes := record.get("spikes"):
        rows.append(("spikes", f"{spikes:,}; their rows are in {run.spikes}"))
    if best:
        rows.append(("adapter", f"{run.best} (the best), {run.last} (the last)"))
        rows.append(("try it", f"python -m jaxlora.generate --run {shlex.quote(str(run.path))}"))
    rows.append(("to go on" if record.get("status") not in ENDED else "again", command))
    progress.table("what came of it", rows)
    _tell_answers(run, progress)


def _nll(evaluation: dict[str, Any]) -> str:
    value = evaluation["eval/nll"]  # None stands for what JSON has no number for
    return "not finite" if value is None else f"{value:.4f}"


def _tell_answers(run: "RunDirectory", progress: "Progress", count: int = 5) -> None:
    """A few held-out questions, with the answer before training and at the best evaluation."""
    scores = {line["step"]: line["eval/exact_match"] for line in run.metrics() if "eval/exact_match" in line}
    best = (run.record.get("best") or {}).get("step")
    if best is None or 0 not in scores or best not in scores:
        return
    before, after = run.read_evaluation(0, "answers"), run.read_evaluation(best, "answers")
    columns = (before["prompt"], before["text"], after["text"], before["reference"])
    rows = [
        [_shortened(cell) for cell in row]
        for row in zip(*(column[:count] for column in columns), strict=True)
    ]
    progress.table(
        f"exact match on {len(before['prompt'])} held-out questions: {scores[0]:.1%} before, {scores[best]:.1%} after",
        rows,
        header=("question", "before", "after", "expected"),
    )


def _shortened(text: str, most: int = 60) -> str:
    flat = " ".join(str(text).split())
    return flat if len(flat) <= most else flat[: most - 1] + "…"


if __name__ == "__main__":
    cli.run(main)
