"""What happens in a run: its events, wired to the folder and to what the person sees."""

import dataclasses
import importlib.metadata
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from jaxlora.config.build import guarding
from jaxlora.config.build.inputs import Data, HeldOut, Model, total_steps
from jaxlora.config.build.programs import Programs, put_batch
from jaxlora.config.schema import KEYS, Config
from jaxlora.core.errors import InputError
from jaxlora.data.batches import EvalBatches
from jaxlora.experiments.records import flatten
from jaxlora.parallel.rows import Share
from jaxlora.training.answers import Answers, columns, lines, markdown, scores
from jaxlora.training.calendar import Calendar
from jaxlora.training.evaluate import Evaluator, Found, Groups
from jaxlora.training.events import Log, Save
from jaxlora.training.loop import Events
from jaxlora.training.metrics import METRICS, better
from jaxlora.training.recording import Recorder
from jaxlora.training.state import TrainState
from jaxlora.training.stopping import EarlyStop, Evaluate, OverfitAlarm, Ranked

TEXTS, LONGEST_TEXT = 2000, 400
"""Held-out examples whose texts a run keeps, and characters of each."""


class Shown(Protocol):
    """What a person is shown of a run; see `Progress`, which does for a run alone."""

    def say(self, text: str, /) -> None: ...

    def step(self, step: int, /) -> None: ...

    def train(
        self, step: int, /, *, loss: float, nll: float, learning_rate: float, tokens_per_second: float
    ) -> None: ...

    def eval(self, done: int, total: int, /) -> None: ...

    def stage(self, text: str, /) -> AbstractContextManager[Callable[[float, float], None]]: ...

    def begin(self, step: int, /) -> None: ...


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
    progress: Shown,
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
        recorder.texts,
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


def texts(data: HeldOut) -> dict[str, list[Any]]:
    """Beginnings of the first held-out examples, so that runs can be compared by example where the data is not.

    Returns:
        Columns "example" (as in the files of losses), "row" of the data, "prompt" and "reference": the last assistant
        turn, and what stands before it. For plain text there is no prompt.
    """
    columns: dict[str, list[Any]] = {"example": [], "row": [], "prompt": [], "reference": []}
    for example, row in enumerate(data.eval.examples.source_rows[:TEXTS].tolist()):
        conversation = data.eval_source[row]
        if isinstance(conversation, str):
            prompt, reference = "", conversation
        else:
            last = max(
                (i for i, message in enumerate(conversation) if message["role"] == "assistant"), default=0
            )
            prompt = conversation[last - 1]["content"] if last else ""
            reference = conversation[last]["content"]
        for name, value in (("example", example), ("row", row), ("prompt", prompt), ("reference", reference)):
            columns[name].append(value if isinstance(value, int) else value[:LONGEST_TEXT])
    return columns


def calendar(config: Config, data: Data, total: int) -> Calendar:
    """When the run evaluates."""
    eval = config.eval
    every = max(1.0, eval.every_epochs * data.train.steps_per_epoch) if eval.every_epochs else eval.every
    finest = eval.finest or max(1, math.ceil(every / 8))
    return Calendar(every, total, eval.adaptive, min(finest, math.ceil(every)))


def _ranked(name: str, mode: str = "auto") -> Ranked:
    """A metric that a config names: NAME for eval/NAME, or its whole name."""
    return Ranked(name if "/" in name else f"eval/{name}", better(name, mode))


def groups(data: HeldOut) -> Groups:
    """The groups of held-out tokens that have metrics of their own."""
    source, examples = data.eval_source, data.eval.examples
    return Groups(examples, source.part_of(examples.source_rows), source.part_names)


def check_names(config: Config, data: HeldOut) -> None:
    """Refuses a group's metric as what best or stop goes by, where the data has no such group.

    Raises:
        InputError: naming those that there are.
    """
    tokens = [name for name in config.eval.metrics if name in METRICS]
    known = [name for name in groups(data).logged(tokens) if not name.startswith("eval/")]
    known += ["train_eval/nll"] if config.eval.train_examples else []
    for key, name in (("checkpoint.best_by", config.checkpoint.best_by), ("stop.by", config.stop.by)):
        if "/" in name.removeprefix("eval/") and name not in known:
            raise InputError(
                f"{key} = '{name}' is not computed: with this data there are, besides eval/NAME, "
                f"{', '.join(known) or 'no others'}.\nSet it with --config.{key}=nll, for example."
            )


def train_slice(config: Config, data: Data) -> tuple[EvalBatches, np.ndarray] | None:
    """The examples of data.train that are evaluated too, and their numbers there; None for none.

    They are drawn with the seed, and at most as many as are held out.
    """
    examples, held_out = data.train.examples, len(data.eval.examples)
    count = min(config.eval.train_examples, held_out, len(examples))
    if not count:
        return None
    # The second word keeps this draw apart from every other use of the same seed.
    drawn = np.random.default_rng([config.seed, 0x511CE]).permutation(len(examples))[:count]
    numbers = np.sort(drawn)
    length, packing = config.data.max_length, config.data.packing
    return EvalBatches(examples.select(numbers), config.eval.batch_size, length, packing), numbers


def scorer(
    config: Config, model: Model, data: Data, programs: Programs, base: Any, progress: Shown
) -> Callable[[TrainState], Found]:
    """Builds `score(state) -> Found`: the metrics of tokens, of held-out data and of the slice of training data."""
    put, share, metrics = put_batch(model), Share(model.mesh), config.eval.metrics
    score = Evaluator(programs.evaluate, data.eval, put, metrics, groups(data), share=share)
    batches, sliced = data.eval.num_batches, train_slice(config, data)
    everything = batches + (sliced[0].num_batches if sliced else 0)

    def run(state: TrainState) -> Found:
        progress.eval(0, everything)
        lora = programs.effective(state, base)
        found, per_example = score(lora, base, lambda done, _: progress.eval(done, everything))
        files = {"eval": per_example}
        if sliced:
            trained = Evaluator(programs.evaluate, sliced[0], put, ("nll",), None, "train_eval", share)
            more, rows = trained(lora, base, lambda done, _: progress.eval(batches + done, everything))
            found |= more
            files["train_eval"] = rows | {"example": sliced[1][rows["example"]].tolist()}
        return Found(found, files)

    return run


def evaluator(
    config: Config,
    score: Callable[[TrainState], Found],
    effective: Callable[[TrainState, Any], Any],
    base: Any,
    answers: Answers | None,
    progress: Shown,
) -> Callable[..., Found]:
    """Builds `evaluate(state, answer=True) -> Found`: all that is asked for, with answers or without.

    Args:
        score: of `scorer`. effective: of `Programs`.
    """

    def run(state: TrainState, answer: bool = True) -> Found:
        found, files, *_ = score(state)
        if answers is None or not answer:
            return Found(found, files)
        with progress.stage("answering held-out prompts") as stage:
            given = answers.answer(effective(state, base), base, stage)
        with progress.stage("scoring the answers"):
            found |= scores(given, config.eval.metrics, config.eval.answer_pattern)
        return Found(
            found, files | {"answers": columns(given)}, {"eval/answers": markdown(given)}, lines(given)
        )

    return run


def facts(config: Config, model: Model, data: Data) -> dict[str, Any]:
    """The fields of record.json that are known before the first step."""
    import jaxlora

    keys = flatten(dataclasses.asdict(config))
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
        "total_steps": total_steps(config, data.train),
        # So that a default which another version changes can be told from what a person chose.
        "not_default": [
            path for path, value in keys.items() if KEYS[path].required or value != KEYS[path].default
        ],
        "baseline": config.journal.baseline,
        "hypothesis": config.journal.hypothesis,
    }
