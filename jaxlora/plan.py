"""See what a config would do before it does it: python -m jaxlora.plan --config configs/quickstart.py --only data"""

import difflib
import errno
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from jaxlora.config.load import CommandParser, add_config_argument, load_config, parse_arguments
from jaxlora.config.schema import Config
from jaxlora.core import cli
from jaxlora.core.errors import InputError

if TYPE_CHECKING:  # what is slow to import is imported where it is used, so that --help answers at once
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

    from jaxlora.config.build.dataplan import Row
    from jaxlora.data.visible import Token
    from jaxlora.runs.progress import Progress

PARTS = ("data",)
DEFAULT_ROWS = 3
INDENT = "  "
SHADES = (("default", "dim"), ("green", "bright_green"))
"""Of tokens that are not trained, and of those that are; neighbours take turns."""


def main(argv: Sequence[str]) -> int:
    parser = CommandParser(
        prog="python -m jaxlora.plan",
        description="Show what a config would do, before any run: rows of data.train with what is trained in them, and "
        "what the data comes to.\nIt needs the tokenizer and the data alone: no weights, no accelerator.",
    )
    add_config_argument(parser)
    parser.add_argument("--only", metavar="PART", help=f"one part of the plan; there is {', '.join(PARTS)}")
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
    arguments, overrides = parse_arguments(parser, argv)
    _check(arguments)
    config = load_config(arguments.config, overrides)
    # What a row holds may be more than this terminal can write.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    return _plan_data(config, arguments.rows, arguments.rows_file)


def _check(arguments: Namespace) -> None:
    """Raises InputError for a part that is not there, or no rows."""
    for part in filter(None, (arguments.only or "").replace(",", " ").split(" ")):
        if part not in PARTS:
            near = difflib.get_close_matches(part, PARTS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(PARTS)}."
            raise InputError(f"--only {part}: there is no such part; {hint}")
    if arguments.rows is not None and arguments.rows < 1:
        raise InputError(f"--rows {arguments.rows} must be at least 1.")


def _plan_data(config: Config, wanted: int | None, file: Path | None) -> int:
    from jaxlora.runs.progress import Progress

    # Rows and tables go to standard output, what is going on to standard error, as with the other commands that answer.
    with Progress() as out, Progress(output=sys.stderr) as progress:
        with _rows_file(file, config) as stream:
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
        from jaxlora.data.visible import printable

        for line in summary.found:
            out.say(printable(line))
        if summary.counts:
            out.table("the data", summary.counts, header=("", "train", "eval"))
        if summary.run:
            out.table("the run", summary.run)
        for refusal in summary.refusals:
            for line in f"training would refuse this: {refusal}".splitlines():
                out.say(printable(line))
    return cli.EXIT_OK


@contextmanager
def _rows_file(file: Path | None, config: Config) -> Iterator[BinaryIO | None]:
    """What rows are written to: it takes the file's place at the end, and shows now whether it can.

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
                    raise InputError(f"--rows-file {file} is the data itself; name another file.")
                if file.exists() and not file.is_file():
                    raise InputError(f"--rows-file {file} is not a file; name one, such as rows.jsonl.")
                if not file.parent.is_dir():
                    raise InputError(f"--rows-file {file}: there is no folder {file.parent}; make it first.")
                stream = stack.enter_context(replacing(file))
            except OSError as error:
                reason = error.strerror or error
                raise InputError(
                    f"--rows-file {file} cannot be written ({reason}); name another file."
                ) from error
            yield stream
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise InputError(
            f"--rows-file {file} could not be written ({error.strerror}); what was there before stays. Make room, or "
            "name a file on another disk."
        ) from error


# ---- what a person reads ------------------------------------------------------------------------------------------


def _tell_rows(
    rows: Sequence["Row"], tokenizer: "PreTrainedTokenizerBase", max_length: int, out: "Progress"
) -> None:
    """Shows rows with their trained tokens coloured, or in brackets where there are no colours."""
    from rich.console import Console
    from rich.text import Text

    from jaxlora.data.visible import CLOSE, NEWLINE, OPEN, bracketed, printable, tokens

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
