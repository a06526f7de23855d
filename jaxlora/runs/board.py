"""Several runs at once, as a person sees them: a live table on a terminal, plain lines elsewhere."""

import collections
import dataclasses
import math
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from jaxlora.runs.progress import Progress, duration

ENDED = ("finished", "stopped_early", "diverged", "dropped", "preempted", "failed")
"""States in which a run does nothing more here."""

STYLES = {"training": "", "finished": "green", "stopped_early": "green", "waiting": "dim", "dropped": "dim"}
_IN_THE_TABLE = re.compile(r"eval at step |early stop: |  answers: |  \"")
"""Lines of a run that only say what the table shows: a terminal that has the table is spared them."""
_RECENT = 8  # moments from which the speed is taken
_BETWEEN = 2.0  # seconds between such moments


@dataclasses.dataclass
class Row:
    """What is known of a run.

    Attributes:
        order: among all. differs: what makes it differ, in short.
        state, detail: one of `waiting`, `compiling`, `training` and `ENDED`, and a few words on it: what it does just
            now, or why it ended.
        step, total: optimizer steps done, and of the whole run; 0 before they are known.
        nll: of the newest logged step. last: eval/nll of the newest evaluation. best: {"step", "eval/nll"}.
    """

    order: int
    differs: str
    state: str = "waiting"
    detail: str = ""
    step: int = 0
    total: int = 0
    nll: float | None = None
    last: float | None = None
    best: Mapping[str, Any] | None = None

    @property
    def rank(self) -> tuple[float, int]:
        """By eval nll, then by order; what has none comes last."""
        value = self.last
        return (math.inf if value is None or not math.isfinite(value) else value, self.order)


class TrialBoard:
    """Shows the trials of a sweep, sorted by eval nll. Every call is cheap: it remembers; drawing is the display's.

    Args:
        trials: name and what differs, of each.
        progress: draws, and prints.
    """

    def __init__(self, trials: Iterable[tuple[str, str]], progress: Progress):
        self._progress = progress
        self.rows: dict[str, Row] = {}
        self.began: float | None = None  # when the first trial was ready, by the monotonic clock
        self._logged: int | None = (
            None  # the step whose train losses are still to be told, where lines are plain
        )
        self._marks: collections.deque[tuple[float, int]] = collections.deque(maxlen=_RECENT)
        for name, differs in trials:
            self.add(name, differs)

    def add(self, name: str, differs: str) -> None:
        """One more trial."""
        self.rows[name] = Row(len(self.rows), differs)

    def state(self, name: str, state: str, detail: str = "") -> None:
        """A trial is now `state`; ends are told, with the detail."""
        row = self.rows[name]
        before, row.state, row.detail = row.state, state, detail
        if state in ENDED and state not in (
            before,
            "preempted",
        ):  # who was asked to leave leaves with all others
            self._progress.say(f"{name}: {state.replace('_', ' ')}: {detail or f'at step {row.step:,}'}")

    def step(self, name: str, step: int, total: int) -> None:
        """A trial has made so many steps of so many."""
        row = self.rows[name]
        made = (
            step == row.step + 1
        )  # else it is where the trial goes on from: what came before is not its speed
        row.step, row.total = step, total
        now = time.monotonic()
        if self.began is None:
            self.began = now
        if made and (not self._marks or now - self._marks[-1][0] >= _BETWEEN):
            self._marks.append((now, sum(row.step for row in self.rows.values())))
        if not self._progress.interactive and self._logged is not None and step > self._logged:
            self._logged = None  # all that make steps together have logged theirs by now
            self._progress.say(self.line())

    def train(self, name: str, **values: Any) -> None:
        """A logged step of a trial: `step` and `nll` count."""
        row = self.rows[name]
        row.nll = values.get("nll", row.nll)
        self._logged = values.get("step", row.step)

    def evaluated(
        self, name: str, step: int, values: Mapping[str, float], best: Mapping[str, Any] | None
    ) -> None:
        """An evaluation of a trial, with the best one so far."""
        row = self.rows[name]
        row.last, row.best = values.get("eval/nll"), best

    def say(self, line: str, name: str = "") -> None:
        """A message, about a trial where one is named; not what the table shows in any case."""
        if name and self._progress.interactive and _IN_THE_TABLE.match(line):
            return
        self._progress.say(f"{name}: {line.strip()}" if name else line)

    def line(self) -> str:
        """Where the trials are: how many of each state, the range of their train losses, the time left."""
        rows = list(self.rows.values())
        counts = collections.Counter(row.state for row in rows)
        parts = [f"{count} {state.replace('_', ' ')}" for state, count in counts.items()]
        training = [row for row in rows if row.state == "training"]
        if training:
            steps = sorted({row.step for row in training})
            # One step apart, they are in the middle of making the same one.
            between = f"{steps[0]:,}" if steps[-1] - steps[0] < 2 else f"{steps[0]:,} to {steps[-1]:,}"
            parts.insert(0, f"step {between}/{max(row.total for row in training):,}")
            known = sorted(
                (row.nll, name) for name, row in self.rows.items() if row in training and _finite(row.nll)
            )
            if known:
                parts.append(
                    f"train nll {known[0][0]:.3f} ({known[0][1]}) to {known[-1][0]:.3f} ({known[-1][1]})"
                )
        doing = [f"{name}: {row.detail}" for name, row in self.rows.items() if row in training and row.detail]
        return "  ".join([*parts, *doing[:1], *filter(None, [self._left()])])

    def table(self, width: int, height: int) -> Table:
        """The trials as a table of at most `height` lines."""
        names = self.rows.copy()
        ordered = sorted(names, key=lambda name: names[name].rank)
        told_apart = any(row.differs not in ("", name) for name, row in names.items())
        shown = ordered[: max(1, height - 2)]  # beside the header and what stands below
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), caption_justify="left")
        table.add_column("trial", no_wrap=True, overflow="ellipsis")
        if told_apart:
            table.add_column("what differs", no_wrap=True, overflow="ellipsis", style="dim")
        for header in ("step", "train nll", "eval nll", "best"):
            table.add_column(header, justify="right", no_wrap=True)
        table.add_column("state", no_wrap=True, overflow="ellipsis")
        for name in shown:
            row = names[name]
            state = row.detail if row.state == "training" and row.detail else row.state.replace("_", " ")
            cells = [Text(name), *([Text(row.differs)] if told_apart else [])]
            cells += [Text(f"{row.step:,}/{row.total:,}" if row.total else "")]
            cells += [Text(_number(value)) for value in (row.nll, row.last)]
            cells += [Text(_best(row.best)), Text(state, style=STYLES.get(row.state, "yellow"))]
            table.add_row(*cells)
        hidden = len(ordered) - len(shown)
        notes = [f"and {hidden} more"] if hidden else []
        left = self._left()
        table.caption = "  ".join([*notes, *([left] if left else [])]) or None
        return table

    def _left(self) -> str:
        """ "3:20 left", by the speed of the last moments; halving makes it less."""
        rows = list(self.rows.values())
        going = [row for row in rows if row.state not in ENDED]
        if len(self._marks) < 2 or not all(row.total for row in going):
            return ""
        (began, first), (now, steps) = self._marks[0], self._marks[-1]
        if steps <= first or not going:
            return ""
        return (
            f"{duration((now - began) / (steps - first) * sum(row.total - row.step for row in going))} left"
        )


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if math.isfinite(value) else "not finite"


def _best(best: Mapping[str, Any] | None) -> str:
    return (
        "" if best is None or best.get("eval/nll") is None else f"{best['eval/nll']:.4f} at {best['step']:,}"
    )
