"""Pictures of the journal: learning curves by model and rank, and the lowest eval nll against every swept setting."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlora.experiments.log import Entry
from jaxlora.experiments.telling import Group, extreme, groups, spike_steps, swept

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST = 20
"""Runs in one picture of curves: there are no more colours that one can tell apart."""

SIZE = (11.0, 5.0)  # inches
DOTS = 110  # an inch


def write_plots(folder: Path, entries: Sequence[Entry]) -> list[Path]:
    """Writes curves-MODEL-rank-R.png for every group of runs, and nll-by-SETTING.png for every swept setting.

    Returns:
        The files, in the order in which they were made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = {f"curves-{group.title}": learning_curves(group) for group in groups(entries)}
    figures |= {f"nll-by-{key}": by_setting(entries, key) for key in swept([entry.run for entry in entries])}
    written = []
    for name, figure in figures.items():
        if figure is not None:
            file = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}.png"
            figure.savefig(file, dpi=DOTS)
            written.append(file)
    return written


def learning_curves(group: Group) -> "Figure | None":
    """Train and eval nll of a group's runs: a ring at the best evaluation, a triangle at each spike.

    Of more than `MOST` runs those with the lowest eval nll are shown. None where there is no curve.
    """
    from matplotlib.figure import Figure

    shown = [entry for entry in group.entries if entry.run.train.values or entry.run.eval.values]
    if not shown:
        return None
    if len(shown) > MOST:
        lowest = {id(entry): extreme(entry.run.eval, "eval/nll") for entry in shown}
        order = sorted(shown, key=lambda entry: found[1] if (found := lowest[id(entry)]) else math.inf)
        shown = [entry for entry in shown if entry in order[:MOST]]
    figure = Figure(figsize=SIZE, layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, entry in enumerate(shown):
        colour = f"C{number % 10}"
        style = "-" if number < 10 else "--"
        steps, values = entry.run.train.of("train/nll")
        finite = np.isfinite(values)
        left.plot(steps[finite], values[finite], style, color=colour, linewidth=0.9, label=entry.run.name)
        for step in spike_steps(entry):
            if len(steps):
                at = int(np.argmin(np.abs(steps - step)))
                height = values[at] if finite[at] else np.max(values[finite], initial=0.0)
                left.plot(
                    step,
                    height,
                    "v",
                    color=colour,
                    markersize=9,
                    markeredgecolor="black",
                    markeredgewidth=0.5,
                )
        steps, values = entry.run.eval.of("eval/nll")
        finite = np.isfinite(values)
        right.plot(steps[finite], values[finite], style, color=colour, marker=".", label=entry.run.name)
        if best := extreme(entry.run.eval, "eval/nll"):
            right.plot(*best, "o", color=colour, markersize=10, fillstyle="none")
    for axes, name in ((left, "train nll"), (right, "eval nll")):
        _dress(axes, "step", name)
        _without_outliers(axes)
    dropped = len(group.entries) - len(shown)
    figure.suptitle(group.title + (f" ({dropped} runs not shown)" if dropped else ""), fontsize=11)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(4, len(shown)), fontsize=8, frameon=False
    )
    return figure


def by_setting(entries: Sequence[Entry], key: str) -> "Figure | None":
    """The lowest eval nll of every run against one setting, a colour a group; None where fewer than two have both."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes: Any = figure.subplots()
    everything: list[float] = []
    for group in groups(entries):
        points = [
            (float(value), best[1], entry.run.name)
            for entry in group.entries
            if isinstance(value := entry.run.config.get(key), int | float)
            and (best := extreme(entry.run.eval, "eval/nll"))
        ]
        if points:
            axes.plot(*zip(*[point[:2] for point in points], strict=True), "o", label=group.title)
            for x, y, name in points:
                axes.annotate(name, (x, y), fontsize=7, xytext=(4, 4), textcoords="offset points")
            everything += [point[0] for point in points]
    if len(set(everything)) < 2:
        return None
    _dress(axes, key, "lowest eval nll")
    if min(everything) > 0 and max(everything) / min(everything) >= 10:
        axes.set_xscale("log")
    _without_outliers(axes)
    axes.legend(fontsize=8, frameon=False)
    return figure


def _dress(axes: "Axes", horizontal: str, vertical: str) -> None:
    axes.set_xlabel(horizontal)
    axes.set_ylabel(vertical)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _without_outliers(axes: "Axes") -> None:
    """Makes the vertical axis logarithmic where a diverged run would press all others into a line."""
    drawn = [np.asarray(line.get_ydata(), np.float64) for line in axes.lines]
    values = np.concatenate(drawn) if drawn else np.zeros(0)
    if len(values) and values.min() > 0 and values.max() > 10 * np.median(values):
        axes.set_yscale("log")
