"""What every run changed, and what came of it: python -m jaxlora.journal runs/"""

import itertools
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlora.config.load import CommandParser
from jaxlora.core import cli
from jaxlora.core.errors import InputError
from jaxlora.core.printing import printable

if TYPE_CHECKING:  # what is slow to import is imported where it is used, so that --help answers at once
    from jaxlora.experiments.compare import Example
    from jaxlora.experiments.log import Entry
    from jaxlora.experiments.records import Run
    from jaxlora.runs.progress import Progress

PROGRAM = "python -m jaxlora.journal"
EVERY = 5.0  # seconds between two looks of --watch
STYLES = {
    "unfair": "yellow",
    "hypothesis": "italic",
    "divergence": "bold red",
    "stuck": "bold red",
    "spike": "yellow",
    "risk": "yellow",
    "overfitting": "yellow",
    "advice": "cyan",
    "note": "magenta",
}
"""How lines of the log look on a terminal, by kind."""


def main(argv: Sequence[str]) -> int:
    commands: dict[str, Callable[[Sequence[str]], int]] = {"compare": _compare, "note": _note}
    try:
        if argv and argv[0] in commands:
            return commands[argv[0]](argv[1:])
        return _log(argv)
    except BrokenPipeError:  # whoever read it (a pager, `head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return cli.EXIT_OK


# ---- the log ------------------------------------------------------------------------------------------------------


def _log(argv: Sequence[str]) -> int:
    parser = CommandParser(
        prog=PROGRAM,
        description="Print, by model and rank, what each run changed against its baseline and what came of it. Runs of "
        "jaxlora, of Hugging Face's Trainer\n(trainer_state.json), TensorBoard's event files and CSV files are read as "
        "they lie there; neither jax nor a network is needed.",
        epilog=f"two runs side by side:     {PROGRAM} compare runs/A runs/B\n"
        f'a sentence of your own:    {PROGRAM} note runs/A "the rate was too high"\n'
        "(each with its own --help)",
    )
    parser.add_argument(
        "roots", nargs="+", type=Path, metavar="FOLDER", help="folders with runs, or runs themselves"
    )
    _add_outputs(parser)
    formats = parser.add_mutually_exclusive_group()
    for name, what in (("markdown", "tables of Markdown"), ("json", "JSON"), ("csv", "CSV")):
        formats.add_argument(f"--{name}", action="store_true", help=f"print {what} instead")
    parser.add_argument(
        "--format",
        default="",
        metavar="F",
        help="read only runs of jaxlora, transformers, tensorboard or csv",
    )
    parser.add_argument(
        "--watch", action="store_true", help="go on, and tell what is new about the runs, until interrupted"
    )
    arguments = parser.parse_args(argv)
    _check_outputs(arguments)
    chosen = next((name for name in ("markdown", "json", "csv") if getattr(arguments, name)), None)
    if arguments.watch and chosen:
        raise InputError(f"--watch goes on for ever and --{chosen} is written once: leave one of them out.")

    from jaxlora.experiments import telling
    from jaxlora.experiments.following import Reader

    reader = Reader()
    entries = _entries(arguments.roots, arguments.format, reader)
    if chosen:
        sys.stdout.write(getattr(telling, f"to_{chosen}")(entries))
        sys.stdout.flush()
    else:
        _print_log(entries)
    _write_outputs(arguments, entries, _title(arguments))
    if arguments.watch:
        return _watch(arguments, reader, entries)
    return cli.EXIT_OK


def _title(arguments: Namespace) -> str:
    return "Journal of " + ", ".join(root.resolve().name for root in arguments.roots)


def _entries(roots: Iterable[Path], only: str, reader: Callable[[Path], "Run"]) -> list["Entry"]:
    """Reads and judges all runs; says so on standard error when it takes long.

    Raises:
        InputError: an unknown format, a folder that is not there, or one without runs.
    """
    with _progress() as progress, progress.stage("reading the runs") as stage:
        from jaxlora.experiments.imports.find import read_all
        from jaxlora.experiments.log import journal

        runs = read_all(roots, only, stage, reader)
    with _progress() as progress, progress.stage(f"comparing {len(runs):,} runs") as stage:
        done = itertools.count(1)
        return journal(runs, lambda: stage(next(done), len(runs)))


def _progress() -> "Progress":
    from jaxlora.runs.progress import Progress

    return Progress(output=sys.stderr)


def _print_log(entries: Sequence["Entry"]) -> None:
    from jaxlora.experiments.telling import groups, lines

    out = _Output()
    width = min(28, max(len(entry.run.name) for entry in entries)) + 2
    for number, group in enumerate(groups(entries)):
        if number:
            out.line()
        out.line(group.title, "bold")
        for entry in group.entries:
            out.entry(
                entry.run.name, width, [(line.text, STYLES.get(line.kind, "")) for line in lines(entry)]
            )


class _Output:
    """Standard output: coloured and wrapped on a terminal, one line a line elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(highlight=False)
        self._plain = not self._console.is_terminal

    def line(self, text: str = "", style: str = "") -> None:
        """One line."""
        from rich.text import Text

        if self._plain:
            print(text)
        else:
            self._console.print(Text(text, style=style))

    def entry(self, name: str, width: int, lines: Sequence[tuple[str, str]]) -> None:
        """A name, and beside it lines of (text, style)."""
        from rich.table import Table
        from rich.text import Text

        if self._plain:
            for number, (text, _) in enumerate(lines):
                label = name if number == 0 else ""
                print(f"  {label.ljust(width)}{text}")
            return
        table = Table.grid(padding=(0, 0, 0, 0))
        table.add_column(width=2)
        table.add_column(width=width, overflow="fold")
        table.add_column(overflow="fold")
        told = Text("\n").join(Text(text, style=style) for text, style in lines)
        table.add_row("", Text(name, style="bold"), told)
        self._console.print(table)


def _watch(arguments: Namespace, reader: Callable[[Path], "Run"], entries: Sequence["Entry"]) -> int:
    """Tells what is new until Ctrl-C."""
    from jaxlora.experiments.following import News

    news, out = News(), _Output()
    news(entries)
    out.line()
    out.line(f"watching {len(entries):,} runs; Ctrl-C ends it", "dim")
    sys.stdout.flush()
    try:
        while True:
            time.sleep(EVERY)
            try:
                entries = _entries(arguments.roots, arguments.format, reader)
            except InputError:
                continue  # the folder is being moved, or made anew
            found = news(entries)
            for name, lines in found:
                told = [(_flat(text), "") for text in lines]
                out.entry(f"{time.strftime('%H:%M:%S')}  {_flat(name)}", 38, told)
            if found:
                _write_outputs(arguments, entries, _title(arguments), quiet=True)
            sys.stdout.flush()
    except KeyboardInterrupt:
        out.line()
        return cli.EXIT_OK


# ---- what is written ----------------------------------------------------------------------------------------------


def _add_outputs(parser: CommandParser) -> None:
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write a report: one HTML file that needs no network"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FOLDER", help="write pictures: learning curves, eval nll by setting"
    )


def _check_outputs(arguments: Namespace) -> None:
    """Refuses what could not be written, before the runs are read.

    Raises:
        InputError: naming the option.
    """
    html, plot = arguments.html, arguments.plot
    if html is not None and (html.is_dir() or not os.access(html.parent, os.W_OK)):
        problem = "is a folder" if html.is_dir() else f"cannot be written in {html.parent}"
        raise InputError(f"--html {html} {problem}: give a file in a folder that is there.")
    if plot is not None:
        there = next(place for place in (plot, *plot.absolute().parents) if place.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise InputError(f"--plot {plot}: {there} is no folder that can be written; give another one.")


def _write_outputs(arguments: Namespace, entries: Sequence["Entry"], title: str, quiet: bool = False) -> None:
    told = []
    with _progress() as progress:
        if arguments.html:
            with progress.stage("writing the report"):
                from jaxlora.experiments.report import write_report

                write_report(arguments.html, entries, title)
            told.append(f"report: {arguments.html}")
        if arguments.plot:
            with progress.stage("drawing the pictures"):
                from jaxlora.experiments.plots import write_plots

                files = write_plots(arguments.plot, entries)
            told.append(f"{len(files)} pictures in {arguments.plot}" if files else "no curves to draw")
        if not quiet:
            for line in told:
                progress.say(line)


# ---- two runs side by side ----------------------------------------------------------------------------------------


def _compare(argv: Sequence[str]) -> int:
    parser = CommandParser(
        prog=f"{PROGRAM} compare",
        description="Show two runs side by side: the settings that differ, the curves, the second one's verdict "
        "against the first, and the held-out\nexamples that got better and worse.",
    )
    for name, what in (("old", "the run to compare with"), ("new", "the run that is judged")):
        parser.add_argument(name, type=Path, metavar=name.upper(), help=what)
    _add_outputs(parser)
    parser.add_argument(
        "--examples", type=int, default=5, metavar="N", help="examples to show of each kind (5)"
    )
    arguments = parser.parse_args(argv)
    _check_outputs(arguments)
    if arguments.examples < 0:
        raise InputError(f"--examples {arguments.examples}: give 0 or more.")

    from jaxlora.experiments import compare

    old, new = _one_run(arguments.old), _one_run(arguments.new)
    entries = compare.entries(old, new)
    _print_comparison(old, new, entries[-1], arguments.examples)
    _write_outputs(arguments, entries, f"{new.name} against {old.name}")
    return cli.EXIT_OK


def _one_run(path: Path) -> "Run":
    """The run in a folder.

    Raises:
        InputError: there is none, or several.
    """
    from jaxlora.experiments.imports.find import read_all

    runs = read_all([path])
    if len(runs) > 1:
        names = ", ".join(run.name for run in runs[:3])
        raise InputError(f"{path} holds {len(runs):,} runs ({names}, ...): give the folder of one.")
    return runs[0]


def _print_comparison(old: "Run", new: "Run", entry: "Entry", count: int) -> None:
    from jaxlora.experiments import compare
    from jaxlora.experiments.telling import lines, plain
    from jaxlora.runs.progress import Progress

    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}"

    with Progress() as out:
        header = ("", old.name, new.name)
        differing = [
            (key, plain(before) or "not set", plain(after) or "not set")
            for key, before, after in compare.settings(old, new)
        ]
        if differing:
            out.table("settings that differ", differing, header=header)
        else:
            out.say("all settings are the same")
        out.table("what came of them", compare.outcomes(old, new), header=header)
        for name in ("eval/nll", "train/nll"):
            curve = compare.curve(old, new, name)
            rows = [
                (f"{step:,}", cell(a), cell(b), f"{b - a:+.4f}" if a is not None and b is not None else "")
                for step, a, b in curve
            ]
            if rows:
                out.table(name, rows, header=("step", old.name, new.name, "difference"))
        out.table("verdict", [(_flat(line.text),) for line in lines(entry) if line.kind != "changes"])
        found = compare.examples(old, new)
        if found is None:
            out.say(
                "by example: nothing to compare, since the runs have no losses of the same held-out examples"
            )
            return
        better, worse = found.better, found.worse
        out.say(
            f"by example: {len(better):,} of {len(found.all):,} are better than at step {found.old_step:,} of "
            f"{old.name}, {len(worse):,} worse (at step {found.new_step:,})"
        )
        for title, examples in (("the most improved", better), ("the worst", worse)):
            if shown := [_example(example) for example in examples[:count]]:
                out.table(title, shown, header=("nll", "was", "is", "prompt", "wanted"))


def _example(example: "Example") -> tuple[Any, ...]:
    prompt = _shortened(example.prompt) or f"example {example.example}"
    numbers = (f"{example.change:+.3f}", f"{example.old:.3f}", f"{example.new:.3f}")
    return (*numbers, prompt, _shortened(example.reference))


def _flat(text: str) -> str:
    """Text of others in one line, without what could command a terminal."""
    return printable(" ".join(text.split()))


def _shortened(text: str, most: int = 56) -> str:
    flat = _flat(text)
    return flat if len(flat) <= most else flat[: most - 1] + "…"


# ---- a person's note ----------------------------------------------------------------------------------------------


def _note(argv: Sequence[str]) -> int:
    parser = CommandParser(
        prog=f"{PROGRAM} note",
        description="Add a sentence of your own to a run: it is kept in the run's record and shown in the log.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("text", nargs="+", help="the sentence")
    arguments = parser.parse_args(argv)

    from jaxlora.experiments import notes

    run = _one_run(arguments.run)
    if not run.path.is_dir():
        raise InputError(f"{run.path} is a file, and notes are kept in folders: put it into one of its own.")
    notes.append(run.path, " ".join(arguments.text))
    if run.source == "jaxlora":
        _into_record(run.path)
    print(f"noted: {' '.join(arguments.text)}")
    return cli.EXIT_OK


def _into_record(folder: Path) -> None:
    """Takes the note into record.json, unless the run is going on: then it does so itself."""
    from jaxlora.runs.directory import RECORD, RunDirectory

    if not (folder / RECORD).is_file():
        return
    try:
        config = RunDirectory.read(folder).config
        with RunDirectory.open(folder, config) as run:
            run.update_record()
    except InputError:
        pass  # in use, or not whole: the note lies beside the record, from where it is read as well


if __name__ == "__main__":
    cli.run(main)
