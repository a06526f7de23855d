"""See what a config would do before it does it: python -m jaxlora.plan --config configs/quickstart.py"""

import difflib
import errno
import json
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from jaxlora.config.load import CommandParser, add_config_argument, load_config, parse_arguments
from jaxlora.config.schema import Config
from jaxlora.core import cli
from jaxlora.core.errors import InputError

if TYPE_CHECKING:  # what is slow to import is imported where it is used, so that --help answers at once
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

    from jaxlora.config.build.compileplan import CompilePlan
    from jaxlora.config.build.dataplan import Row, Summary
    from jaxlora.data.visible import Token
    from jaxlora.runs.progress import Progress

PARTS = ("data", "compile")
DEFAULT_ROWS = 3
INDENT = "  "
_SIMULATED = "xla_force_host_platform_device_count"
SHADES = (("default", "dim"), ("green", "bright_green"))
"""Of tokens that are not trained, and of those that are; neighbours take turns."""


def main(argv: Sequence[str]) -> int:
    parser = CommandParser(
        prog="python -m jaxlora.plan",
        description="Show what a config would do, before any run: rows of data.train with what is trained in them, "
        "what the data comes to, and what the\ncompiled programs take of each device. data needs the tokenizer and the "
        "data; compile needs the model's config.json alone; neither needs weights\nor an accelerator. Exit code 1: "
        "it does not fit.",
    )
    add_config_argument(parser)
    parser.add_argument(
        "--only", metavar="PARTS", help=f"parts of the plan, with commas between: {', '.join(PARTS)}"
    )
    parser.add_argument(
        "--topology",
        metavar="NAME",
        help="compile for a TPU that need not be there, such as v5e:2x4, v4:2x2x1, v5p:2x2x1 or v6e:2x4 (needs libtpu)",
    )
    parser.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="compile for N simulated CPU devices; without this and --topology: for the devices at hand",
    )
    parser.add_argument(
        "--rows", type=int, metavar="N", help=f"rows of data.train to show, from the first ({DEFAULT_ROWS})"
    )
    parser.add_argument(
        "--rows-file",
        type=Path,
        metavar="FILE",
        help='write these rows, all of them without --rows, as JSON lines {"ids", "trained", "text"}: whole, '
        "before data.max_length and packing",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan's figures as JSON")
    arguments, overrides = parse_arguments(parser, argv)
    parts = _check(arguments)
    if "compile" in parts:
        _prepare_devices(arguments)
    config = load_config(arguments.config, overrides)
    # What a row holds may be more than this terminal can write.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    return _plan(config, parts, arguments)


def _check(arguments: Namespace) -> tuple[str, ...]:
    """The parts that are asked for.

    Raises:
        InputError: a part that is not there, no rows, or two kinds of devices.
    """
    asked = [part for part in (arguments.only or "").replace(",", " ").split(" ") if part]
    for part in asked:
        if part not in PARTS:
            near = difflib.get_close_matches(part, PARTS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(PARTS)}."
            raise InputError(f"--only {part}: there is no such part; {hint}")
    for option in ("rows", "devices"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise InputError(f"--{option} {value} must be at least 1.")
    if arguments.topology and arguments.devices:
        raise InputError(
            f"--topology {arguments.topology} has its own devices; leave out --devices {arguments.devices}."
        )
    return tuple(part for part in PARTS if part in (asked or PARTS))


def _prepare_devices(arguments: Namespace) -> None:
    """Sets what JAX reads when it is imported.

    Raises:
        InputError: an unknown topology, or there is no libtpu.
    """
    if arguments.topology:
        from jaxlora.parallel import topology

        topology.parse(arguments.topology)
        topology.prepare_environment()
    elif arguments.devices:
        flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if _SIMULATED not in flag]
        os.environ["XLA_FLAGS"] = " ".join([*flags, f"--{_SIMULATED}={arguments.devices}"])
        os.environ["JAX_PLATFORMS"] = "cpu"


def _plan(config: Config, parts: Sequence[str], arguments: Namespace) -> int:
    from jaxlora.runs.progress import Progress

    told: dict[str, Any] = {"config": arguments.config, "topology": arguments.topology or None}
    code = cli.EXIT_OK
    # Rows and tables go to standard output, what is going on to standard error, as with the other commands that answer.
    with _output("--json", arguments.json, config) as stream, Progress() as out:
        with Progress(output=sys.stderr) as progress:
            if "data" in parts:
                told["data"] = _plan_data(config, arguments.rows, arguments.rows_file, out, progress).json()
            if "compile" in parts:
                plan = _plan_compile(config, arguments, out, progress)
                told["compile"] = plan.json()
                code = cli.EXIT_OK if plan.fits else cli.EXIT_FAILED
                if "data" not in parts:
                    _tell_constants(config, plan, out)
        if stream:
            stream.write((json.dumps(told, indent=2) + "\n").encode())
    if arguments.json:
        print(f"the plan is in {arguments.json}", file=sys.stderr)
    return code


def _plan_compile(
    config: Config, arguments: Namespace, out: "Progress", progress: "Progress"
) -> "CompilePlan":
    with progress.stage("starting JAX"):
        import jax

        from jaxlora.config.build import compileplan
        from jaxlora.parallel import topology

        devices = topology.devices(arguments.topology) if arguments.topology else jax.devices()
    if arguments.devices:
        if len(devices) < arguments.devices:  # JAX was there before this command, in the same process
            raise InputError(
                f"--devices {arguments.devices}: JAX has started with {len(devices)} already; give at most so many."
            )
        devices = devices[: arguments.devices]
    plan = compileplan.compile_plan(config, devices, progress)
    for title, rows, header in compileplan.describe(plan):
        out.table(title, rows, header=header)
    for remark in plan.remarks:
        out.say(remark)
    for refusal in plan.refusals:
        out.say(f"it does not fit: {refusal}")
    return plan


def _tell_constants(config: Config, plan: "CompilePlan", out: "Progress") -> None:
    """What the data's part of the plan would tell, and needs no data."""
    from jaxlora.config.build import dataplan

    rows = [("LoRA scale", dataplan.scale(config))]
    if config.optim.label_smoothing:
        floor = f"the objective cannot fall below {plan.smoothing_floor:.3f} nats; nll is never smoothed"
        rows.append(("label smoothing", f"{config.optim.label_smoothing:g}: {floor}"))
    out.table("the run", rows)


def _plan_data(
    config: Config, wanted: int | None, file: Path | None, out: "Progress", progress: "Progress"
) -> "Summary":
    with _output("--rows-file", file, config) as stream:
        with progress.stage("loading the tokenizer"):
            from jaxlora.config.build import dataplan
            from jaxlora.data.sources import load_conversations

            encoder = dataplan.encoder(config)
        with progress.stage("reading the data"):
            source = load_conversations(config.data.train, config.data.train_split)
        count = len(source) if file and wanted is None else wanted or DEFAULT_ROWS
        chosen = source.select(range(min(count, len(source))))
        shown = []
        with progress.stage("encoding the rows") as stage:
            for row in dataplan.rows(chosen, encoder, stage):
                if stream:
                    stream.write(row.json(encoder.tokenizer))
                if len(shown) < (wanted or DEFAULT_ROWS):
                    shown.append(row)
    _tell_rows(shown, encoder.tokenizer, config.data.max_length, out)
    if wanted and wanted > len(source):
        out.say(f"--rows {wanted:,}: these are all {len(source):,} rows of data.train")
    if file:
        out.say(f"{len(chosen):,} of {len(source):,} rows are in {file}")
    with progress.stage("laying out all the data") as stage:
        summary = dataplan.summary(config, encoder, stage)
    from jaxlora.core.printing import printable

    for line in summary.found:
        out.say(printable(line))
    if summary.counts:
        out.table("the data", summary.counts, header=("", "train", "eval"))
    if summary.run:
        out.table("the run", summary.run)
    for refusal in summary.refusals:
        for line in f"training would refuse this: {refusal}".splitlines():
            out.say(printable(line))
    return summary


@contextmanager
def _output(option: str, file: Path | None, config: Config) -> Iterator[BinaryIO | None]:
    """What a file is written to: it takes the file's place at the end, and shows now whether it can.

    Raises:
        InputError: a place that cannot be written, or that must not be, or a disk that fills up.
    """
    from jaxlora.runs.files import replacing

    if file is None:
        yield None
        return
    sources = (config.data.train, config.data.eval)
    names = [name for source in sources for name in ((source,) if isinstance(source, str) else source)]
    try:
        with ExitStack() as stack:
            try:
                if any(Path(name).expanduser().resolve() == file.resolve() for name in names if name):
                    raise InputError(f"{option} {file} is the data itself; name another file.")
                if file.exists() and not file.is_file():
                    raise InputError(f"{option} {file} is not a file; name one that is, or is not there yet.")
                if not file.parent.is_dir():
                    raise InputError(f"{option} {file}: there is no folder {file.parent}; make it first.")
                stream = stack.enter_context(replacing(file))
            except OSError as error:
                reason = error.strerror or error
                raise InputError(
                    f"{option} {file} cannot be written ({reason}); name another file."
                ) from error
            yield stream
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise InputError(
            f"{option} {file} could not be written ({error.strerror}); what was there before stays. Make room, or "
            "name a file on another disk."
        ) from error


# ---- what a person reads ------------------------------------------------------------------------------------------


def _tell_rows(
    rows: Sequence["Row"], tokenizer: "PreTrainedTokenizerBase", max_length: int, out: "Progress"
) -> None:
    """Shows rows with their trained tokens coloured, or in brackets where there are no colours."""
    from rich.console import Console
    from rich.text import Text

    from jaxlora.core.printing import NEWLINE, printable
    from jaxlora.data.visible import CLOSE, OPEN, bracketed, tokens

    console = Console(file=sys.stdout, force_terminal=True, highlight=False)
    coloured = out.interactive and not console.no_color
    marked = "green, special ones bold" if coloured else f"in {OPEN}{CLOSE}"
    out.say(f"trained tokens are {marked}; a newline is {NEWLINE}")
    for row in rows:
        out.say("")
        heading = printable(row.describe(max_length))
        shown = tokens(tokenizer, row.encoded)
        if coloured:
            console.print(Text(heading, style="bold"))
            width = max(20, shutil.get_terminal_size().columns - len(INDENT))
            text = _coloured(shown)
            text.rstrip()  # a template may end with a newline, which is marked already
            for line in text.wrap(console, width):
                console.print(Text(INDENT).append_text(line), soft_wrap=True)
        else:
            out.say(heading)
            out.say("\n".join(INDENT + line for line in bracketed(shown).removesuffix("\n").split("\n")))
    out.say("")


def _coloured(shown: Sequence["Token"]) -> "Text":
    """Trained tokens green, special ones bold, and every other token in another shade, so that its ends are seen."""
    from rich.text import Text

    text = Text()
    for number, token in enumerate(token for token in shown if token.text):
        shade = SHADES[token.trained][number % 2]
        text.append(token.text, f"bold {SHADES[token.trained][0]}" if token.special else shade)
    return text


if __name__ == "__main__":
    cli.run(main)
