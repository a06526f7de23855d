"""Score an adapter or a bare base on a data set: python -m jaxlora.evaluate --run runs/NAME"""

import os
import re
import sys
from argparse import Action, BooleanOptionalAction, Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlora.config.build.chosen import Chosen, add_arguments, choose, load
from jaxlora.config.load import CommandParser
from jaxlora.config.schema import Config, MeshConfig
from jaxlora.core import cli
from jaxlora.core.errors import InputError
from jaxlora.parallel import launch
from jaxlora.training.metrics import ANSWER_METRICS, METRICS

if TYPE_CHECKING:  # what is slow to import is imported where it is used, so that --help answers at once
    from jaxlora.config.build.evaluation import Scored
    from jaxlora.config.build.inputs import HeldOut, Model

DEFAULT_MAX_LENGTH = 1024
KNOWN = (*METRICS, *ANSWER_METRICS)
OPTIONS = {
    "data.train and data.eval take": "--data takes",
    "data.eval": "--data",
    "data.train": "--data",
    "data.max_length": "--max-length",
    "eval.batch_size": "--batch-size",
    "eval.max_examples": "--max-examples",
    "eval.generate": "--generate",
    "eval.max_new_tokens": "--max-new-tokens",
    "lora.init_from": "--adapter",
    "mesh.fsdp=-1 --config.mesh.data=1": "--shard-base",
}
"""Config keys -> the options of this command, for what lower rooms say about a key."""


def main(argv: Sequence[str]) -> int:
    arguments = _parse(argv)
    try:
        return _evaluate(arguments)
    except InputError as error:
        raise InputError(_in_options(str(error), arguments)) from error
    except BrokenPipeError:  # whoever read the result (a pager, `head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return cli.EXIT_OK


# ---- what is asked for --------------------------------------------------------------------------------------------


def _parse(argv: Sequence[str]) -> Namespace:
    parser = CommandParser(
        prog="python -m jaxlora.evaluate",
        description="Score a run's adapter, a PEFT folder or a bare base on a data set, by the metrics of training. "
        "The result goes to\nstandard output, everything else to standard error.",
    )
    add_arguments(parser)
    parser.add_argument(
        "--data",
        nargs="+",
        action="extend",
        metavar="F",
        help="hub ids or paths to jsonl, json, csv, parquet (the run's own held-out data)",
    )
    parser.add_argument("--split", help="with --data: split of a hub data set (train)")
    parser.add_argument(
        "--max-length", type=int, metavar="N", help="tokens in a row (the run's; else 1024, or what fits)"
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="rows computed at once (the run's, or 8)")
    parser.add_argument(
        "--max-examples", type=int, metavar="N", help="examples to score; 0 is all (the run's on its data)"
    )
    parser.add_argument(
        "--packing",
        action=BooleanOptionalAction,
        help="several examples, kept apart, in one row (the run's, or yes)",
    )
    parser.add_argument(
        "--train-on", choices=("assistant", "all"), help="the tokens that count (the run's, or assistant)"
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        action=_Names,
        default=KNOWN,
        help=f"some of {', '.join(METRICS)}, and of answers {', '.join(ANSWER_METRICS)} (all)",
    )
    parser.add_argument(
        "--generate", type=int, metavar="N", help="prompts to answer, greedily (the run's on its data, or 0)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="longest answer, in tokens (the run's, or 64)"
    )
    parser.add_argument("--with-base", action="store_true", help="score the bare base too")
    parser.add_argument(
        "--shard-base", action="store_true", help="cut the base over the devices instead of copying it"
    )
    parser.add_argument(
        "--out", type=Path, metavar="F.jsonl", help='write a line {"example", "nll", "tokens"} an example'
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    launch.add_arguments(parser)
    arguments = parser.parse_args(argv)
    if arguments.split is not None and not arguments.data:
        raise InputError("--split goes with --data: leave it out, or name the data.")
    if arguments.out is not None and (arguments.out.is_dir() or not os.access(arguments.out.parent, os.W_OK)):
        problem = "is a folder" if arguments.out.is_dir() else f"cannot be written in {arguments.out.parent}"
        raise InputError(f"--out {arguments.out} {problem}: give a file in a folder that is there.")
    return arguments


class _Names(Action):
    """Names of metrics, separated by spaces or commas."""

    def __call__(self, parser: Any, namespace: Namespace, values: Any, option_string: str | None = None):
        names = tuple(dict.fromkeys(name for value in values for name in value.split(",") if name))
        unknown = [name for name in names if name not in KNOWN]
        if unknown or not names:
            told = " ".join(unknown) or "names none"
            raise InputError(f"--metrics {told}: the known ones are {', '.join(KNOWN)}.")
        setattr(namespace, self.dest, names)


def _config(chosen: Chosen, arguments: Namespace) -> Config:
    """The run's config, or a new one, with what was asked for in its place.

    Raises:
        InputError: no data, or an impossible value.
    """

    def given(name: str, default: Any) -> Any:
        value = getattr(arguments, name)
        return default if value is None else value

    if chosen.config is None and not arguments.data:
        raise InputError(
            "name the data to score it on: --data F (a hub id, or a jsonl, json, csv or parquet)."
        )
    config = chosen.config or Config.from_dict(
        {"model": {"path": chosen.model}, "data": {"train": arguments.data, "max_length": DEFAULT_MAX_LENGTH}}
    )
    data, eval = config.data, config.eval
    # A run's kernels may be those of another platform; auto takes them where they are.
    attention = config.model.attention if config.model.attention in ("plain", "blockwise") else "auto"
    if arguments.data:  # what the run does with its own data says nothing about other data
        data = replace(data, eval=tuple(arguments.data), eval_split=arguments.split or "")
        eval = replace(eval, max_examples=0, generate=0)
    return replace(
        config,
        model=replace(
            config.model,
            path=chosen.model,
            revision=chosen.revision,
            dtype=chosen.dtype,
            quantize=chosen.quantize,
            quantize_embeddings=chosen.quantize_embeddings,
            attention=attention,
        ),
        data=replace(
            data,
            max_length=given("max_length", data.max_length),
            packing=given("packing", data.packing),
            train_on=given("train_on", data.train_on),
        ),
        eval=replace(
            eval,
            batch_size=given("batch_size", eval.batch_size),
            max_examples=given("max_examples", eval.max_examples),
            generate=given("generate", eval.generate),
            max_new_tokens=given("max_new_tokens", eval.max_new_tokens),
        ),
        mesh=MeshConfig(1, -1, 1) if arguments.shard_base else config.mesh,
    )


def _in_options(text: str, arguments: Namespace) -> str:
    """What was said about config keys, said about the options that were, or can be, typed.

    "data.max_length = 65, ... set --config.data.max_length=64" -> "--max-length 65, ... set --max-length=64".
    """
    table = OPTIONS | {"model.path": "the run's model.path" if arguments.run else "--model"}
    text = text.replace("Set it in the config file, or with", "Give, for example,")
    for key, option in table.items():
        text = re.sub(
            rf"(?:--config\.)?\b{re.escape(key)}( = )?", lambda m, o=option: o + " " * bool(m[1]), text
        )
    return text


# ---- scoring ------------------------------------------------------------------------------------------------------


def _evaluate(arguments: Namespace) -> int:
    chosen = choose(arguments)
    config = _config(chosen, arguments)
    started = launch.of(arguments, os.environ)
    from jaxlora.runs.progress import Progress

    launch.keep_stdout(started)
    with ExitStack() as stack:
        others = started is not None and started.index > 0  # they say nothing
        output = stack.enter_context(open(os.devnull, "w")) if others else sys.stderr
        progress = stack.enter_context(Progress(output=output))

        def say(line: str) -> None:
            if exchange.first():
                progress.say(_in_options(line, arguments))

        with progress.stage("starting JAX"):
            import jax

            from jaxlora.config.build import evaluation, generation, inputs, memory, several, wiring
            from jaxlora.core.compilation import use_persistent_cache
            from jaxlora.parallel import exchange, processes

            processes.join(progress.say, started)
            if watch := processes.watch(started):
                stack.enter_context(watch.together())
                several.check_same(config)
            use_persistent_cache()
            devices = jax.devices()

        # ---- what is wrong with the input shows here, before the long wait
        mesh = evaluation.fitting_mesh(config.mesh, config.eval.batch_size, devices, say)
        if mesh.size < len(devices) and not exchange.alone():
            raise InputError(
                f"{len(devices)} devices of {exchange.count()} processes, and rows to share out over {mesh.size}: set "
                f"--batch-size to a multiple of {len(devices)}, or start one process alone."
            )
        model = inputs.find(config.model, mesh)
        positions = model.spec.max_position_embeddings
        if chosen.config is None and arguments.max_length is None:
            config = replace(config, data=replace(config.data, max_length=min(DEFAULT_MAX_LENGTH, positions)))
        inputs.check_positions(config, positions)
        inputs.check_rows("eval.batch_size", config.eval.batch_size, mesh)
        of_answers = [name for name in arguments.metrics if name in ANSWER_METRICS]
        if arguments.metrics != KNOWN and of_answers and not config.eval.generate:
            raise InputError(
                f"--metrics {' '.join(of_answers)}: of answers, and none are generated; give --generate 64, say."
            )
        read = load(chosen, model)
        if arguments.with_base and read is None:
            raise InputError("--with-base goes with an adapter: the bare base is scored as it is.")
        with progress.stage("reading the data") as stage:
            data = inputs.held_out(config, inputs.encoder(model, config.data.train_on), say, stage)
        model = inputs.knowing_rows(model, config, data.eval.examples)
        answers = wiring.answers(config, model, data, say)
        with progress.stage("loading the base") as stage:
            base = inputs.base(model, stage)
        with progress.stage("making the adapter ready"):
            lora = generation.effective(model, base, *read) if read else {}

        loras = [lora, {}] if arguments.with_base else [lora]
        with progress.stage("compiling the evaluation step"):
            fitted = memory.fit_evaluation(config, model, loras, answers, say)
        data = memory.with_eval_rows(data, fitted.eval_rows)
        scored = [
            evaluation.score(
                step,
                model,
                data,
                base,
                lora,
                arguments.metrics,
                answers,
                config.eval.answer_pattern,
                progress,
            )
            for step, answers, lora in zip(fitted.steps, fitted.answers, loras, strict=True)
        ]
        before = _in_training(chosen, config, data, say)

    if not exchange.first():
        return cli.EXIT_OK
    try:
        if arguments.json:
            _print_json(chosen, config, data, scored)
        else:
            _print_table(chosen, config, model, data, scored, before)
    finally:  # whoever reads standard output may be gone; the file is wanted all the same
        if arguments.out:
            for path, found in zip((arguments.out, _beside(arguments.out, "base")), scored, strict=False):
                _write(path, found)
    return cli.EXIT_OK


def _in_training(
    chosen: Chosen, config: Config, data: "HeldOut", say: Callable[[str], None]
) -> dict[str, float]:
    """What the run itself found at this step, where it was scored on the same data; {} where it was not."""
    run, own = chosen.run, chosen.config
    if (
        run is None
        or own is None
        or config.data != own.data
        or config.eval.max_examples != own.eval.max_examples
    ):
        return {}
    known = (run.record.get("data") or {}).get("eval", {}).get("fingerprint", data.eval_source.fingerprint)
    if known != data.eval_source.fingerprint:
        say(f"the held-out data of {run.path} is not what it was in training")
        return {}
    for line in run.metrics():
        if line["step"] == chosen.step and "eval/nll" in line:
            return {name: value for name, value in line.items() if name.startswith("eval")}
    return {}


# ---- what is told -------------------------------------------------------------------------------------------------


def _speed(data: "HeldOut", scored: "Scored") -> float:
    """Tokens that are not padding, a second."""
    return float(data.eval.examples.lengths.sum() / scored.seconds)


def _print_json(chosen: Chosen, config: Config, data: "HeldOut", scored: Sequence["Scored"]) -> None:
    """One object; the metrics have the names of metrics.jsonl."""
    from jaxlora.runs.files import encode_json

    examples, found = data.eval.examples, [one.metrics for one in scored]
    told = {
        "model": chosen.model,
        "revision": chosen.revision,
        "dtype": config.model.dtype,
        "quantize": config.model.quantize,
        "quantize_embeddings": config.model.quantize_embeddings,
        "run": chosen.run.path if chosen.run else None,
        "step": chosen.step,
        **({"averaged": chosen.averaged} if chosen.averaged else {}),
        "adapter": chosen.folder,
        "data": [part.name for part in data.eval_source.parts],
        "fingerprint": data.eval_source.fingerprint,
        "max_length": config.data.max_length,
        "train_on": config.data.train_on,
        "examples": len(examples),
        "truncated": examples.truncated,
        "dropped": examples.dropped,
        "trained_tokens": examples.trained_tokens,
        "seconds": round(scored[0].seconds, 3),
        "tokens_per_second": round(_speed(data, scored[0]), 1),
        **found[0],
        **({"base": found[1]} if len(found) > 1 else {}),
    }
    sys.stdout.write(encode_json(told).decode())
    sys.stdout.flush()


def _print_table(
    chosen: Chosen,
    config: Config,
    model: "Model",
    data: "HeldOut",
    scored: Sequence["Scored"],
    before: Mapping[str, float],
) -> None:
    """What was scored on what, and one column of metrics for each."""
    from jaxlora.runs.progress import Progress

    examples, devices = data.eval.examples, model.mesh.devices
    mesh = ", ".join(f"{axis} {size}" for axis, size in model.mesh.shape.items())
    facts = [
        ("scored", f"{chosen.description} ({config.model.kept})"),
        ("on", ", ".join(part.name for part in data.eval_source.parts)),
        (
            "examples",
            f"{len(examples):,} in {len(data.eval.rows):,} rows of {config.data.max_length:,}"
            + (f"; {examples.truncated:,} are cut there" if examples.truncated else "")
            + (f", {examples.dropped:,} left out" if examples.dropped else ""),
        ),
        ("trained tokens", f"{examples.trained_tokens:,} of {examples.tokens:,}"),
        ("devices", f"{devices.size} x {devices.flat[0].device_kind} (mesh: {mesh})"),
        ("time", f"{scored[0].seconds:.1f} s, {_speed(data, scored[0]):,.0f} tokens/s"),
    ]
    columns = {"with adapter" if chosen.folder or chosen.run else "bare base": scored[0].metrics}
    columns |= {"bare base": scored[1].metrics} if len(scored) > 1 else {}
    columns |= {"in training": before} if before else {}
    rows = [
        (name.removeprefix("eval/"), *(_number(column.get(name)) for column in columns.values()))
        for name in scored[0].metrics
    ]
    with Progress(output=sys.stdout) as out:
        out.table("what was scored", facts)
        out.table("what came of it", rows, header=("", *columns))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _beside(path: Path, word: str) -> Path:
    """F.jsonl -> F.word.jsonl"""
    return path.with_name(f"{path.stem}.{word}{path.suffix}")


def _write(path: Path, scored: "Scored") -> None:
    """The losses of the examples, and the answers beside them, as in a run's eval/."""
    from jaxlora.runs.files import encode_rows, replace

    replace(path, encode_rows(scored.per_example))
    if scored.answers is not None:
        replace(_beside(path, "answers"), encode_rows(scored.answers))


if __name__ == "__main__":
    cli.run(main)
