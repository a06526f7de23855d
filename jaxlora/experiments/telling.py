"""The journal's entries for other tools and for paper: plain values, Markdown, JSON, CSV."""

import csv
import io
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import orjson

from jaxlora.experiments.baseline import model_of, rank_of
from jaxlora.experiments.changes import matters, number, scale
from jaxlora.experiments.curve import Curve
from jaxlora.experiments.log import Entry
from jaxlora.experiments.records import Curves, Run

SETTINGS = {
    "learning_rate": "optim.learning_rate",
    "warmup_steps": "optim.warmup_steps",
    "batch_size": "train.batch_size",
    "weight_decay": "optim.weight_decay",
    "label_smoothing": "optim.label_smoothing",
    "epochs": "train.epochs",
    "alpha": "lora.alpha",
    "seed": "seed",
}
"""Columns of tables -> the config keys that they show."""


_WATCHING = ("eval.", "checkpoint.", "stop.", "guard.")
"""Settings of how a run is watched, which are no axis of a picture."""


class Group(NamedTuple):
    """Entries of one model and rank, as a person's log has them."""

    model: str
    rank: int | None
    entries: list[Entry]

    @property
    def title(self) -> str:
        """ "Qwen2.5-0.5B-Instruct, rank 128"; what is not known is said to be."""
        rank = "rank not known" if self.rank is None else f"rank {self.rank}"
        return f"{self.model or 'model not known'}, {rank}"


def groups(entries: Sequence[Entry]) -> list[Group]:
    """The entries by model and rank, in the order in which `log.journal` has them."""

    def key(entry: Entry) -> tuple[str, int | None]:
        return model_of(entry.run), rank_of(entry.run)

    return [Group(*place, list(members)) for place, members in itertools.groupby(entries, key)]


def curves_of(run: Run, name: str) -> Curves:
    """The curves among which a metric is."""
    return run.train if name.startswith("train/") else run.eval


def extreme(curves: Curves, name: str) -> tuple[int, float] | None:
    """(step, value) of the lowest finite value of a metric; None where there is none."""
    steps, values = curves.of(name)
    finite = np.isfinite(values)
    if not finite.any():
        return None
    at = int(np.argmin(np.where(finite, values, math.inf)))
    return int(steps[at]), float(values[at])


def latest(curves: Curves, name: str) -> float | None:
    """The last value of a metric; None where there is none, or it is not finite."""
    _, values = curves.of(name)
    return float(values[-1]) if len(values) and math.isfinite(values[-1]) else None


def row(entry: Entry) -> dict[str, Any]:
    """One entry as plain values, for a line of a table: None is what is not known."""
    run = entry.run
    best = extreme(run.eval, "eval/nll")
    settings = {name: run.config.get(key) for name, key in SETTINGS.items()}
    return {
        "model": model_of(run) or None,
        "rank": rank_of(run),
        "run": run.name,
        "status": run.status or None,
        "steps": run.steps,
        **settings,
        "best_eval_nll": best[1] if best else None,
        "best_step": best[0] if best else None,
        "last_eval_nll": latest(run.eval, "eval/nll"),
        "last_train_nll": latest(run.train, "train/nll"),
        "seconds": run.record.get("seconds"),
        "tokens": run.record.get("tokens"),
        "baseline": entry.baseline.name if entry.baseline else None,
        "changes": "; ".join(entry.changes),
        "unfair": "; ".join(entry.unfair),
        "hypothesis": entry.hypothesis,
        "verdict": "; ".join(finding.text for finding in entry.verdict),
        "advice": entry.advice,
        "notes": "; ".join(entry.notes),
        "source": run.source,
        "path": str(run.path),
    }


def spike_steps(entry: Entry) -> list[int]:
    """The steps of the spikes in a run's verdict."""
    if all(finding.kind != "spike" for finding in entry.verdict):
        return []
    return [spike.step for spike in Curve(entry.run).spikes]


def swept(runs: Sequence[Run]) -> list[str]:
    """Settings with numbers that decide how a run trains, and of which runs of one model have several values.

    An alpha that only follows the rank is none.
    """
    values: dict[tuple[str, str], set[float]] = {}
    scales: dict[str, set[float | None]] = {}
    for run in runs:
        model = model_of(run)
        scales.setdefault(model, {None}).add(scale(run.config))
        for key, value in run.config.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and matters(key) and not key.startswith(_WATCHING):
                values.setdefault((model, key), set()).add(value)
    varied: dict[str, int] = {}
    for (model, key), found in values.items():
        follows = key == "lora.alpha" and len(scales[model]) <= 2
        if len(found) > 1 and not follows:
            varied[key] = max(len(found), varied.get(key, 0))
    return sorted(varied, key=lambda key: -varied[key])


class Line(NamedTuple):
    """One line of what is told of a run; `kind` is that of a finding, or says what else it is."""

    kind: str
    text: str


def lines(entry: Entry) -> Iterator[Line]:
    """What a person reads of a run, in order: what changed, why, what came of it, what to try, what was noted."""
    if entry.changes:
        yield Line("changes", ", ".join(entry.changes))
    elif entry.baseline:
        yield Line("changes", f"the same settings as {entry.baseline.name}")
    else:
        yield Line("changes", "baseline")
    if entry.unfair and entry.baseline:
        yield Line("unfair", f"not a fair comparison with {entry.baseline.name}: {'; '.join(entry.unfair)}")
    if entry.hypothesis:
        yield Line("hypothesis", f"hypothesis: {entry.hypothesis}")
    for finding in entry.verdict:
        yield Line(finding.kind, finding.text)
    if entry.advice:
        yield Line("advice", f"next: {entry.advice}")
    for note in entry.notes:
        yield Line("note", f"note: {note}")


# ---- formats ------------------------------------------------------------------------------------------------------


def to_json(entries: Sequence[Entry]) -> str:
    """An array of objects: the values of `row`, with lists of changes, findings (kind, text, numbers) and notes."""
    told = [
        row(entry)
        | {
            "changes": list(entry.changes),
            "unfair": list(entry.unfair),
            "verdict": [
                {"kind": finding.kind, "text": finding.text, "numbers": dict(finding.numbers)}
                for finding in entry.verdict
            ],
            "notes": list(entry.notes),
            "config": dict(entry.run.config),
        }
        for entry in entries
    ]
    options = orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
    return orjson.dumps(told, default=str, option=options).decode() + "\n"


def to_csv(entries: Sequence[Entry]) -> str:
    """A line an entry, with the columns of `row`; what is not known is empty."""
    text = io.StringIO()
    rows = [row(entry) for entry in entries]
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["run"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_markdown(entries: Sequence[Entry]) -> str:
    """The log as tables by model and rank: run, what was changed, what came of it."""
    parts = []
    for group in groups(entries):
        parts.append(f"## {_cell(group.title)}\n")
        parts.append("| run | what was changed | what came of it |\n| --- | --- | --- |")
        for entry in group.entries:
            told = list(lines(entry))
            changed = [line.text for line in told if line.kind in ("changes", "unfair", "hypothesis")]
            came = [line.text for line in told if line.kind not in ("changes", "unfair", "hypothesis")]
            cells = (entry.run.name, "<br>".join(map(_cell, changed)), "<br>".join(map(_cell, came)))
            parts.append(f"| {_cell(cells[0])} | {cells[1]} | {cells[2]} |")
        parts.append("")
    return "\n".join(parts) + ("" if parts and not parts[-1] else "\n")


def _cell(text: str) -> str:
    """Text that a Markdown table shows as it is."""
    flat = " ".join(text.split())
    for mark in "\\|<*_`[":
        flat = flat.replace(mark, f"\\{mark}" if mark != "<" else "&lt;")
    return flat


def plain(value: Any) -> Any:
    """A value of a config or a record as a person writes it: 0.0001 -> "1e-4", ("a", "b") -> "a, b"."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return number(value)
    if isinstance(value, list | tuple):
        return ", ".join(str(plain(item)) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {plain(item)}" for name, item in value.items())
    return "" if value is None else str(value)
