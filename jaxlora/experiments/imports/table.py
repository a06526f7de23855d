"""CSV files of curves: a column of steps and one a metric, or what TensorBoard and Weights & Biases export.

step,train/loss,eval/loss             one run, named after the file
Step,A - loss,A - loss__MIN,B - loss  a run a prefix (Weights & Biases; __MIN and __MAX are left out)
Wall time,Step,Value                  one metric of a run: run-NAME-tag-train_loss.csv (TensorBoard)
run,step,train/loss                   a run a name
"""

import csv
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxlora.experiments.imports.trainer import complete, metric_name
from jaxlora.experiments.records import Run, curves, read_notes

STEPS = ("step", "global_step", "train/global_step", "trainer/global_step", "iteration", "iter", "_step")
_NO_METRICS = {"wall time", "epoch", "train/epoch", "_timestamp", "_runtime", "timestamp", "time"}
_EXPORTED = re.compile(r"run-(?P<run>.+?)-tag-(?P<tag>.+)")


def steps_column(header: Sequence[str]) -> str | None:
    """The column that counts steps, None where there is none."""
    named = {name.strip().lower(): name for name in reversed(header)}
    return next((named[name] for name in STEPS if name in named), None)


def is_table(file: Path) -> bool:
    """Whether a file is CSV with a column of steps and another one."""
    if file.suffix.lower() not in (".csv", ".tsv") or not file.is_file():
        return False
    try:
        with file.open(newline="", encoding="utf-8-sig", errors="replace") as stream:
            header = next(csv.reader([stream.readline(100_000)], _dialect(file)), [])
    except (OSError, csv.Error):
        return False
    return len(header) > 1 and steps_column(header) is not None


def read_tables(files: Iterable[Path]) -> list[Run]:
    """The runs of CSV files; one run may be in several, a metric each."""
    rows: dict[tuple[Path, str], list[dict[str, Any]]] = {}
    problems: dict[tuple[Path, str], list[str]] = {}
    sources: dict[tuple[Path, str], list[Path]] = {}
    for file in files:
        for name, found, broken in _read(file):
            exported = _EXPORTED.fullmatch(file.stem)
            key = (file.parent if exported else file, name)
            rows.setdefault(key, []).extend(found)
            sources.setdefault(key, []).append(file)
            told = problems.setdefault(key, [])
            if broken:
                shown = ", ".join(map(str, broken[:5])) + (", ..." if len(broken) > 5 else "")
                lines = "line" if len(broken) == 1 else "lines"
                told.append(
                    f"{file.name}: {len(broken):,} {lines} could not be read ({lines.rstrip('s')} {shown})"
                )
    return [_run(key[1], rows[key], problems[key], sources[key]) for key in rows]


def _run(name: str, rows: list[dict[str, Any]], problems: list[str], files: list[Path]) -> Run:
    config: dict[str, Any] = {}
    complete(config, rows, 0, problems)
    train, evaluated = curves(rows)
    written = max(file.stat().st_mtime for file in files)
    return Run(
        name=name,
        path=files[0],
        config=config,
        record={"notes": read_notes(files[0], {}, problems)},
        train=train,
        eval=evaluated,
        source="csv",
        problems=tuple(problems),
        started=written,
        written=written,
    )


def _read(file: Path) -> list[tuple[str, list[dict[str, Any]], list[int]]]:
    """(run's name, rows of `records.curves`, numbers of broken lines) of each run in a file."""
    with file.open(newline="", encoding="utf-8-sig", errors="replace") as stream:
        lines = list(csv.reader(stream, _dialect(file)))
    header = lines[0] if lines else []
    column = steps_column(header)
    if column is None:
        return []
    at = header.index(column)
    exported = _EXPORTED.fullmatch(file.stem)
    own = next(
        (index for index, name in enumerate(header) if name.strip().lower() in ("run", "run_name")), None
    )
    targets: list[tuple[int, str, str]] = []  # column, run, metric
    for index, name in enumerate(header):
        if index in (at, own) or name.strip().lower() in _NO_METRICS or name.endswith(("__MIN", "__MAX")):
            continue
        run, dash, metric = name.rpartition(" - ")
        if exported and name.strip().lower() == "value":
            targets.append((index, exported["run"], _tag(exported["tag"])))
        else:
            targets.append((index, run if dash else file.stem, metric_name(metric)))
    found: dict[str, list[dict[str, Any]]] = {}
    broken: dict[str, list[int]] = {run: [] for _, run, _ in targets}
    for number, line in enumerate(lines[1:], 2):
        if not any(cell.strip() for cell in line):
            continue
        try:
            step = float(line[at])
            cells = [line[index] for index, _, _ in targets]
            values = [float(cell) if cell.strip() else None for cell in cells]
            if not step.is_integer():
                raise ValueError
        except (ValueError, IndexError, OverflowError):
            for numbers in broken.values():
                numbers.append(number)
            continue
        for (_, run, metric), value in zip(targets, values, strict=True):
            if value is None:
                continue
            name = line[own].strip() if own is not None else run
            row: dict[str, Any] = {"step": int(step), metric: value if math.isfinite(value) else None}
            if row[metric] is None:
                row[f"{metric}/nonfinite"] = str(value)
            found.setdefault(name, []).append(row)
    told = [number for numbers in broken.values() for number in numbers] if own is not None else []
    return [(run, rows, sorted(set(told)) or broken.get(run, [])) for run, rows in found.items()]


def _tag(tag: str) -> str:
    """TensorBoard's file names have _ for the / of a tag."""
    split, _, rest = tag.partition("_")
    return metric_name(f"{split}/{rest}" if rest else tag)


def _dialect(file: Path) -> type[csv.Dialect]:
    return csv.excel_tab if file.suffix.lower() == ".tsv" else csv.excel
