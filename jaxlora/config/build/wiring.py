"""What happens in a run: its events, wired to the folder and to what the person sees."""

import importlib.metadata
import math
from collections.abc import Callable
from typing import Any

from jaxlora.config.build import guarding
from jaxlora.config.build.inputs import Data, HeldOut, Model
from jaxlora.config.build.programs import Programs, put_batch
from jaxlora.config.schema import Config
from jaxlora.runs.progress import Progress
from jaxlora.training.answers import Answers, exact_match
from jaxlora.training.calendar import Calendar
from jaxlora.training.evaluate import Evaluator, Found
from jaxlora.training.events import Log, Save
from jaxlora.training.loop import Events
from jaxlora.training.metrics import better
from jaxlora.training.recording import Recorder
from jaxlora.training.state import TrainState
from jaxlora.training.stopping import EarlyStop, Evaluate, OverfitAlarm, Ranked


def answers(config: Config, model: Model, data: HeldOut, say: Callable[[str], None]) -> Answers | None:
    """The held-out prompts to answer at each evaluation, or None when eval.generate is 0; says what is left out."""
    if not config.eval.generate:
        return None
    count = min(config.eval.generate, len(data.eval.examples))
    rows = data.eval.examples.source_rows[:count]
    answers = Answers(
        model.decoder,
        data.encoder,
        [data.eval_source[int(row)] for row in rows],
        max_new_tokens=config.eval.max_new_tokens,
        batch_size=config.eval.batch_size,
        mesh=model.mesh,
    )
    if answers.left_out:
        say(
            f"{answers.left_out:,} of {count:,} held-out prompts are not answered: they leave no room for "
            f"eval.max_new_tokens = {config.eval.max_new_tokens} in the model's positions"
        )
    return answers


def events(
    config: Config,
    data: Data,
    total: int,
    evaluator: Callable[[TrainState, bool], Found],
    recorder: Recorder,
    progress: Progress,
) -> Events:
    """The run's events, wired to its recorder and to what the person sees.

    Args:
        total: steps of the run.
        evaluator: evaluates a state; the switch says whether prompts are answered.
    """
    standing = recorder.standing

    best_by = _ranked(config.checkpoint.best_by, config.checkpoint.best_mode)
    stop_by = _ranked(config.stop.by)
    days = calendar(config, data, total)
    evaluate = Evaluate(
        standing,
        days,
        best_by,
        config.checkpoint.best,
        (best_by.name, stop_by.name),
        config.eval.generate_every,
        evaluator,
        recorder.best,
        recorder.metrics,
        recorder.examples,
        progress.say,
        recorder.recall,
        OverfitAlarm(standing, recorder.recall, progress.say, recorder.texts),
    )
    min_steps = config.optim.warmup_steps if config.stop.min_steps is None else config.stop.min_steps
    return Events(
        guard=guarding.guard(config, data, recorder),
        log=Log(config.log.every, recorder.metrics, progress.step, progress.train),
        evaluate=evaluate,
        stop=EarlyStop(
            standing,
            stop_by,
            config.stop.patience,
            config.stop.min_delta,
            config.stop.min_delta_unit == "standard_errors",
            min_steps,
            days.every if days.adaptive else None,
            recorder.recall,
            progress.say,
        ),
        save=Save(standing, config.checkpoint.every, recorder.save),
    )


def calendar(config: Config, data: Data, total: int) -> Calendar:
    """When the run evaluates."""
    eval = config.eval
    every = max(1.0, eval.every_epochs * data.train.steps_per_epoch) if eval.every_epochs else eval.every
    finest = eval.finest or max(1, math.ceil(every / 8))
    return Calendar(every, total, eval.adaptive, min(finest, math.ceil(every)))


def _ranked(name: str, mode: str = "auto") -> Ranked:
    """A metric that a config names: NAME for eval/NAME, or its whole name."""
    return Ranked(name if "/" in name else f"eval/{name}", better(name, mode))


def evaluator(
    config: Config,
    model: Model,
    data: Data,
    programs: Programs,
    base: Any,
    answers: Answers | None,
    progress: Progress,
) -> Callable[[TrainState, bool], Found]:
    """Evaluates a state: all that is asked for."""
    score = Evaluator(programs.evaluate, data.eval, put_batch(model), config.eval.metrics)

    def run(state: TrainState, answer: bool) -> Found:
        progress.eval(0, data.eval.num_batches)
        lora = programs.effective(state, base)
        metrics, per_example = score(lora, base, progress.eval)
        files = {"eval": per_example}
        if answers is not None and answer:
            exact, files["answers"] = answered(answers, lora, base, progress)
            metrics |= exact
        return Found({f"eval/{name}": value for name, value in metrics.items()}, files)

    return run


def answered(
    answers: Answers, lora: Any, base: Any, progress: Progress
) -> tuple[dict[str, float], dict[str, list[Any]]]:
    """What the answers come to: metrics by name, and the answers' columns."""
    with progress.stage("answering held-out prompts") as stage:
        found = answers.answer(lora, base, stage)
    columns = {name: [getattr(a, name) for a in found] for name in ("prompt", "reference", "text", "exact")}
    return {"exact_match": exact_match(found)}, columns


def facts(config: Config, model: Model, data: Data) -> dict[str, Any]:
    """The fields of record.json that are known before the first step."""
    import jaxlora

    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "numpy")
    devices = model.mesh.devices
    return {
        "versions": {"jaxlora": jaxlora.__version__}
        | {name: importlib.metadata.version(name) for name in names},
        "devices": f"{devices.size} x {devices.flat[0].device_kind}",
        "data": {
            name: {
                "fingerprint": source.fingerprint,
                "examples": len(batches.examples),
                "tokens": batches.examples.tokens,
                "trained_tokens": batches.examples.trained_tokens,
            }
            for name, source, batches in (
                ("train", data.train_source, data.train),
                ("eval", data.eval_source, data.eval),
            )
        },
        "baseline": config.journal.baseline,
        "hypothesis": config.journal.hypothesis,
    }
