"""The report: one HTML file that needs nothing else, with the log, curves, a table and the details of every run."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

import jaxlora
from jaxlora.experiments import compare
from jaxlora.experiments.log import Entry
from jaxlora.experiments.records import Run
from jaxlora.experiments.telling import curves_of, extreme, groups, lines, row, spike_steps, swept

ASSETS = Path(__file__).with_name("report_assets")

METRICS = (
    "eval/nll", "train/nll", "train_eval/nll", "train/grad_norm", "train/learning_rate", "eval/loss", "train/loss",
    "eval/token_accuracy", "eval/exact_match",
)  # fmt: skip
"""Metrics that come first; others follow, where there are few runs."""

COLUMNS = (
    "run", "model", "rank", "learning_rate", "warmup_steps", "batch_size", "weight_decay", "label_smoothing", "epochs",
    "steps", "best_eval_nll", "best_step", "last_eval_nll", "last_train_nll", "seconds", "status", "verdict",
)  # fmt: skip
"""Columns of the table; those in which nothing is known are left out."""

FEW = 40
"""Runs up to which all metrics and the examples are in the report; of more, the first few metrics alone."""

POINTS = 120_000
"""Points of all curves together, which keeps the file below some 3 MB."""

FINEST, COARSEST = 600, 40
"""Most and fewest points of one curve."""


def write_report(
    file: Path, entries: Sequence[Entry], title: str = "Journal", made: str | None = None
) -> None:
    """Writes the report.

    Args:
        file: replaced whole.
        entries: as `log.journal` gives them.
        title: the heading.
        made: the date that is told; today by default, "" for none.
    """
    aside = file.with_name(f"{file.name}.partial")
    aside.write_text(to_html(entries, title, made), encoding="utf-8")
    aside.replace(file)


def to_html(entries: Sequence[Entry], title: str = "Journal", made: str | None = None) -> str:
    """The report as text; arguments as for `write_report`."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=False,
    )

    def asset(name: str) -> Markup:
        return Markup((ASSETS / name).read_text(encoding="utf-8"))

    numbers = {id(entry.run): number for number, entry in enumerate(entries)}
    told = [
        {"title": group.title, "entries": [_told(entry, numbers[id(entry.run)]) for entry in group.entries]}
        for group in groups(entries)
    ]
    return environment.get_template("report.html.j2").render(
        title=title,
        facts=_facts(entries),
        groups=told,
        made=time.strftime("%Y-%m-%d") if made is None else made,
        version=jaxlora.__version__,
        data=Markup(_json(_payload(entries, numbers))),
        css=asset("report.css"),
        js=asset("report.js"),
        chart_js=asset("chart.js"),
    )


def _told(entry: Entry, number: int) -> dict[str, Any]:
    """What stands in the log without JavaScript."""
    best = extreme(entry.run.eval, "eval/nll")
    score = f"eval nll {best[1]:.3g} at step {best[0]:,}" if best else entry.run.status.replace("_", " ")
    return {"id": number, "name": entry.run.name, "lines": list(lines(entry)), "score": score}


def _facts(entries: Sequence[Entry]) -> str:
    """ "18 runs, 3 groups of model and rank; lowest eval nll 1.2 (NAME)"."""
    found = groups(entries)
    text = f"{len(entries):,} run{'s' * (len(entries) != 1)}"
    if len(found) > 1:
        text += f", {len(found):,} groups by model and rank"
    return text


def _payload(entries: Sequence[Entry], numbers: Mapping[int, int]) -> dict[str, Any]:
    """What the report's script reads: everything beyond the log."""
    runs = [entry.run for entry in entries]
    few = len(runs) <= FEW
    metrics = _metrics(runs, few)
    curves_each = max(1, len(runs) * max(1, len(metrics)))
    points = int(np.clip(POINTS // curves_each, COARSEST, FINEST))
    common = _common(runs)
    titles = {id(entry.run): group.title for group in groups(entries) for entry in group.entries}
    table = [row(entry) for entry in entries]
    told = []
    for number, (entry, cells) in enumerate(zip(entries, table, strict=True)):
        run = entry.run
        best = extreme(run.eval, "eval/nll")
        baseline = numbers.get(id(entry.baseline)) if entry.baseline else None
        told.append(
            {
                "id": number,
                "name": run.name,
                "group": titles[id(run)],
                "baseline": baseline,
                "best": best[0] if best else None,
                "spikes": spike_steps(entry),
                "row": {name: cells[name] for name in COLUMNS},
                "findings": [
                    {
                        "kind": finding.kind,
                        "numbers": {name: _short(value) for name, value in finding.numbers.items()},
                    }
                    for finding in entry.verdict
                    if finding.numbers
                ],
                "config": {key: value for key, value in run.config.items() if key not in common},
                "facts": _run_facts(run),
                "curves": {name: _curve(run, name, points) for name in metrics if _has(run, name)},
                "examples": _examples(entry) if few and baseline is not None else None,
            }
        )
    return {
        "runs": told,
        "metrics": metrics,
        "columns": [name for name in COLUMNS if any(cells[name] not in (None, "") for cells in table)],
        "common": common,
        "swept": swept(runs),
        "shown": list(range(min(len(runs), 8))),
    }


def _has(run: Run, name: str) -> bool:
    return name in curves_of(run, name).values


def _metrics(runs: Sequence[Run], few: bool) -> list[str]:
    """Metrics that a run has, the weightiest first; a loss that is the nll is left out."""
    there = {name: None for run in runs for curves in (run.eval, run.train) for name in curves.values}
    for name in ("train/loss", "eval/loss"):
        nll = name.replace("loss", "nll")
        if all(
            np.array_equal(curves_of(run, name).of(name)[1], curves_of(run, nll).of(nll)[1]) for run in runs
        ):
            there.pop(name, None)
    first = [name for name in METRICS if name in there]
    return first + [name for name in there if name not in first] if few else first[:3]


def _curve(run: Run, name: str, points: int) -> tuple[list[int], list[float | None]]:
    """Steps and values, of many points those that show its shape: the lowest and the highest of every stretch."""
    steps, values = curves_of(run, name).of(name)
    if len(steps) > points:
        stretches = max(1, points // 2)
        width = len(values) // stretches
        begins = np.arange(stretches) * width
        parts = values[: stretches * width].reshape(stretches, width)
        rest = np.arange(stretches * width, len(values))
        rest = rest[[np.argmin(values[rest]), np.argmax(values[rest])]] if len(rest) else rest
        ends = np.array([0, len(values) - 1])
        chosen = np.unique(
            np.concatenate([ends, begins + parts.argmin(axis=1), begins + parts.argmax(axis=1), rest])
        )
        steps, values = steps[chosen], values[chosen]
    return steps.tolist(), [value if math.isfinite(value) else None for value in _rounded(values).tolist()]


def _rounded(values: np.ndarray) -> np.ndarray:
    """To five digits, more than a picture shows."""
    with np.errstate(divide="ignore", invalid="ignore"):
        digits = 4 - np.floor(np.log10(np.abs(values)))
    # A power of ten up to 1e22 is exact, so the quotient is the double nearest to the decimal.
    scale = 10.0 ** np.clip(np.where(np.isfinite(digits), digits, 0), 0, 22)
    return np.rint(values * scale) / scale


def _short(value: float) -> float | None:
    """A number to five digits; what is not finite has no place in a report."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _common(runs: Sequence[Run]) -> dict[str, Any]:
    """Settings that all runs have, and alike."""
    if len(runs) < 2:
        return {}
    first = runs[0].config
    return {key: value for key, value in first.items() if all(run.config.get(key) == value for run in runs)}


def _run_facts(run: Run) -> dict[str, Any]:
    """What the record says besides the curves."""
    versions, data = run.record.get("versions"), run.record.get("data")
    facts: dict[str, Any] = {
        "folder": str(run.path),
        "source": run.source,
        "status": run.record.get("status"),
        "reason": run.record.get("reason"),
        "steps": run.steps,
        "seconds": run.record.get("seconds"),
        "tokens": run.record.get("tokens"),
        "devices": run.record.get("devices"),
        "jaxlora": versions.get("jaxlora") if isinstance(versions, Mapping) else None,
    }
    if isinstance(data, Mapping):
        for name, part in data.items():
            if isinstance(part, Mapping):
                facts[f"{name} data"] = ", ".join(f"{key} {value}" for key, value in part.items())
    return {name: value for name, value in facts.items() if value is not None}


def _examples(entry: Entry) -> dict[str, Any] | None:
    assert entry.baseline is not None
    found = compare.examples(entry.baseline, entry.run)
    if found is None:
        return None

    def listed(examples: Sequence[compare.Example]) -> list[dict[str, Any]]:
        return [
            {
                "example": one.example,
                "change": _short(one.change),
                "prompt": one.prompt,
                "reference": one.reference,
            }
            for one in examples[: compare.SHOWN]
        ]

    return {"better": listed(found.better), "worse": listed(found.worse)}


def _json(value: Any) -> str:
    """JSON that may stand in a script element: no < in it."""
    return (
        orjson.dumps(value, default=str, option=orjson.OPT_SERIALIZE_NUMPY).decode().replace("<", "\\u003c")
    )
