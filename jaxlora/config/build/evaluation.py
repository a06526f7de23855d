"""What an evaluation outside of a run is made of: the devices it takes, and what it finds."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from jaxlora.config.build import generation, inputs, memory, programs, wiring
from jaxlora.config.build.chosen import Chosen, load
from jaxlora.config.build.inputs import HeldOut, Model
from jaxlora.config.schema import Config, MeshConfig, ModelConfig
from jaxlora.core.errors import InputError
from jaxlora.lora.spec import LoraSpec
from jaxlora.parallel import sharding
from jaxlora.parallel.mesh import make_mesh
from jaxlora.parallel.rows import Share
from jaxlora.runs.progress import Progress
from jaxlora.training.answers import Answers, columns, scores
from jaxlora.training.evaluate import Evaluator


def fitting_mesh(wanted: MeshConfig, rows: int, devices: Sequence[Any], say: Callable[[str], None]) -> Mesh:
    """The mesh to evaluate on: the one that is wanted, or as many devices as a batch's rows divide over.

    A base that is cut stays cut, and the devices are not reduced: fewer may not hold it (see `inputs.check_rows`).

    Args:
        wanted: of the run, or a new one.
        rows: in a batch.
        devices: all there are.
        say: takes a line for the person, where it is another mesh.
    """
    cut = (wanted.fsdp, wanted.tensor) != (1, 1)
    try:
        mesh = make_mesh((wanted.data, wanted.fsdp, wanted.tensor), devices)
    except InputError:  # the run had other devices
        mesh = None
    if mesh is not None and (cut or rows % sharding.row_devices(mesh) == 0):
        return mesh
    count = max(n for n in range(1, len(devices) + 1) if rows % n == 0)
    if mesh is None:
        asked = f"mesh.data = {wanted.data}, mesh.fsdp = {wanted.fsdp}, mesh.tensor = {wanted.tensor}"
        say(f"the run's mesh ({asked}) does not fit {len(devices)} devices: rows are shared out over {count}")
    else:
        say(f"{count} of {len(devices)} devices are used: a batch of {rows} rows divides over no more")
    return make_mesh((1, count, 1) if cut else (count, 1, 1), devices[:count])


class Scored(NamedTuple):
    """An evaluation's outcome.

    Attributes:
        metrics: by the name they are logged under in a run, with those of answers where prompts were answered.
        per_example: columns, as `training.evaluate.Evaluation` has them.
        answers: columns, or None.
        seconds: that the losses took, without compilation and answers.
    """

    metrics: dict[str, float]
    per_example: dict[str, list[Any]]
    answers: dict[str, list[Any]] | None
    seconds: float


def score(
    step: Callable[..., Any],
    model: Model,
    data: HeldOut,
    base: Mapping[str, Any],
    lora: Mapping[str, Any],
    metrics: Sequence[str],
    answers: Answers | None,
    pattern: str,
    progress: Progress,
) -> Scored:
    """Evaluates one adapter, as a run does.

    Args:
        step: of `memory.fit_evaluation`, for this adapter.
        lora: the adapter as the decoder reads it; {} for the bare base.
        metrics: names of `METRICS` and `ANSWER_METRICS`.
        answers: the prompts to answer besides, with the program for this adapter; or None.
        pattern: `eval.answer_pattern`.
    """
    groups = wiring.groups(data)
    evaluator = Evaluator(
        step, data.eval, programs.put_batch(model), metrics, groups, share=Share(model.mesh)
    )
    progress.eval(0, data.eval.num_batches)
    began = time.perf_counter()
    found, per_example = evaluator(lora, base, progress.eval)
    seconds = time.perf_counter() - began
    if answers is None:
        return Scored(found, per_example, None, seconds)
    with progress.stage("answering held-out prompts") as stage:
        given = answers.answer(lora, base, stage)
    with progress.stage("scoring the answers"):
        return Scored(found | scores(given, metrics, pattern), per_example, columns(given), seconds)


class Averaged(NamedTuple):
    """A mean of adapters that was evaluated.

    Attributes:
        adapter, spec: as `chosen.load` gives them.
        nll: of its run's held-out data.
    """

    adapter: dict[str, Any]
    spec: LoraSpec
    nll: float


def averaged(chosen: Chosen, config: Config, devices: Sequence[Any], progress: Progress) -> Averaged:
    """Evaluates a run's averaged adapter on the run's own held-out data, as the evaluate command does.

    Args:
        chosen: with `averaged`; its config is `config`.
        devices: all there are.
    Raises:
        InputError: base, data or a checkpoint are gone, or the evaluation does not fit.
    """
    mesh = fitting_mesh(config.mesh, config.eval.batch_size, devices, progress.say)
    of_base = ModelConfig(
        chosen.model,
        chosen.revision,
        chosen.dtype,
        chosen.quantize,
        chosen.quantize_embeddings,
        config.model.remat,
    )
    model = inputs.find(of_base, mesh)
    inputs.check_rows("eval.batch_size", config.eval.batch_size, mesh)
    read = load(chosen, model)
    if read is None:
        raise InputError(f"{chosen.description} has no adapter: there is nothing to average.")
    with progress.stage("reading the held-out data") as stage:
        encoder = inputs.encoder(model, config.data.train_on)
        data = inputs.held_out(config, encoder, progress.say, stage)
    model = inputs.knowing_rows(model, config, data.eval.examples)
    with progress.stage("loading the base") as stage:
        base = inputs.base(model, stage)
    lora = generation.effective(model, base, *read)
    with progress.stage("compiling the evaluation step"):
        fitted = memory.fit_evaluation(config, model, [lora], None, progress.say)
    data = memory.with_eval_rows(data, fitted.eval_rows)
    evaluator = Evaluator(
        fitted.steps[0],
        data.eval,
        programs.put_batch(model),
        ("nll",),
        wiring.groups(data),
        share=Share(model.mesh),
    )
    progress.eval(0, data.eval.num_batches)
    metrics, _ = evaluator(lora, base, progress.eval)
    return Averaged(*read, metrics["eval/nll"])
