"""A folder of TensorBoard's event files as a run, whoever wrote them."""

from pathlib import Path
from typing import Any

from jaxlora.experiments.imports.events import event_files, read_events
from jaxlora.experiments.imports.trainer import arguments, complete, scalar_rows
from jaxlora.experiments.records import Run, curves, read_notes, started


def is_board(folder: Path) -> bool:
    """Whether event files of a run lie in the folder; those of a sweep are for TensorBoard's HParams tab alone."""
    return bool(event_files(folder)) and not (folder / "sweep.json").is_file()


def read_board(folder: Path) -> Run:
    """Reads the event files of one folder as one run; what the Trainer wrote about its settings too."""
    files = event_files(folder)
    logs = read_events(files)
    config, rows, problems = arguments(logs), scalar_rows(logs), list(logs.problems)
    total = int(config.get("train.max_steps") or 0)
    complete(config, rows, total, problems)
    if not rows:
        problems.append("the event files hold no scalars")
    record: dict[str, Any] = {"notes": read_notes(folder, {}, problems)}
    if logs.began is not None and logs.ended is not None:
        record["seconds"] = round(logs.ended - logs.began, 1)
    train, evaluated = curves(rows)
    return Run(
        name=folder.resolve().name,
        path=folder,
        config=config,
        record=record,
        train=train,
        eval=evaluated,
        source="tensorboard",
        problems=tuple(problems),
        started=logs.began or started(folder, record),
        written=max((file.stat().st_mtime for file in files), default=None),
    )
