"""Train many adapters over one frozen base: python -m jaxlora.sweep --config configs/sweeps/quickstart_lr.py"""

import contextlib
import dataclasses
import math
import re
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlora.config.load import CommandParser, add_config_argument, config_name, parse_arguments
from jaxlora.config.sweep import (
    SWEEP_KEYS,
    Sweep,
    described,
    described_defaults,
    find_sweep_key,
    load_sweep,
    make,
)
from jaxlora.core import cli
from jaxlora.core.errors import InputError
from jaxlora.runs.directory import ENDED, RunDirectory, default_path
from jaxlora.runs.files import lock_folder, release
from jaxlora.sweeps import search
from jaxlora.sweeps.halving import TIED
from jaxlora.sweeps.ledger import Ledger, check_is_sweep_or_empty
from jaxlora.sweeps.ranking import Place, advice, ranking
from jaxlora.sweeps.trials import Trial, flat, groups, shown, stack_key, told

if TYPE_CHECKING:  # what is slow to import is imported where it is used, so that --help answers at once
    from jaxlora.config.schema import Config
    from jaxlora.runs.board import TrialBoard
    from jaxlora.runs.progress import Progress


FREE = "mesh."
"""Keys in which a sweep that goes on may differ: they say where it is computed."""

SHOWN_METRICS = ("eval/nll", "train/nll", "train_eval/nll", "eval/token_accuracy")
"""What TensorBoard's HParams tab shows of each trial, where all of them log it."""


def main(argv: Sequence[str]) -> int:
    parser = CommandParser(
        prog="python -m jaxlora.sweep",
        description="Train many LoRA adapters over one frozen base, as many at once as fit. Each trial is a run in a "
        "folder of its own. The same command\nwith the same --workdir goes on where it stopped.",
    )
    parser.epilog = (
        "Any key of the base config is base.KEY here: --config.base.train.max_steps=100. Its keys are those of\n"
        "python -m jaxlora.train --help; trials and ranges name them without base."
    )
    parser.add_argument(
        "--workdir", type=Path, help="the sweep's folder (default: runs/<MonDD_HH-MM-SS>_<config>)"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the trials and their groups, and end")
    add_config_argument(parser, keys=SWEEP_KEYS)
    arguments, overrides = parse_arguments(parser, argv, find_sweep_key)
    with _words_of_sweeps():
        sweep = load_sweep(arguments.config, overrides)
        if arguments.dry_run:
            _list(sweep)
            return cli.EXIT_OK
        path = arguments.workdir or default_path(config_name(arguments.config))
        typed = ["--config", arguments.config, *overrides, "--workdir", str(path)]
        return train_all(sweep, path, f"python -m jaxlora.sweep {shlex.join(typed)}")


@contextlib.contextmanager
def _words_of_sweeps() -> Any:
    """Wrong input found by what trains any run names keys as of a config: here they are the base's."""
    try:
        yield
    except InputError as error:
        raise InputError(re.sub(r"--config\.(?!base\.|sweep\.)", "--config.base.", str(error))) from error


def train_all(sweep: Sweep, path: Path, command: str) -> int:
    """Trains all trials of a sweep, or goes on with them, and says what came of it.

    Args:
        sweep: the sweep.
        path: its folder.
        command: as typed, with the folder.
    Returns:
        The exit code: 0 when every trial has ended or all were saved on request, 1 when one failed or could not be
        written whole.
    """
    from jaxlora.runs.board import TrialBoard
    from jaxlora.runs.progress import Progress

    check_is_sweep_or_empty(path)
    path.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(path)
    try:
        _check_same_sweep(path, sweep)
        with Progress() as progress:
            board = TrialBoard([(trial.name, told(trial.changes)) for trial in sweep.trials], progress)
            return _Command(sweep, path, command, progress, board).run()
    finally:
        release(lock)


def _check_same_sweep(path: Path, sweep: Sweep) -> None:
    """A folder goes on with the sweep that it holds, to which trials may be added.

    Raises:
        InputError: it holds another one.
    """
    noted = Ledger(path)
    now, before = described(sweep), noted.get("sweep")
    if before is not None:
        lost = [name for name, changes in before["trials"].items() if now["trials"].get(name) != changes]
        base = described_defaults() | before["base"]  # the folder may be older than a key
        keys = [key for key in now["base"] if not key.startswith(FREE) and now["base"][key] != base.get(key)]
        what = [f"base.{key}" for key in keys[:2]]
        what += [f"sweep.{name}" for name in ("halving", "search") if now[name] != before[name]]
        if lost:
            what.append(f"trial {lost[0]}" + (f" and {len(lost) - 1} more" if lost[1:] else ""))
        if what:
            raise InputError(
                f"{path} holds another sweep: {' and '.join(what)} {'are' if what[1:] else 'is'} not what it was.\n"
                "Give another --workdir, or the sweep's own config, to which trials may be added."
            )
    noted.note("sweep", now)


@dataclasses.dataclass
class _Command:
    """One call of the command.

    Attributes:
        trials: all that are known by now; a search adds to them. ledger: of the folder.
        began: when.
    """

    sweep: Sweep
    path: Path
    command: str
    progress: "Progress"
    board: "TrialBoard"

    def __post_init__(self) -> None:
        self.trials = list(self.sweep.trials)
        self.ledger = Ledger(self.path)
        self.began = time.monotonic()

    def run(self) -> int:
        """Trains what is left, and tells what came of it."""
        for trial in self.trials:
            self._remember(trial)
        self._compare()
        if not self.trials or not all(map(self._ended, self.trials)):
            self._tell_plan()
        before = sum(row.step for row in self.board.rows.values())
        with cli.leaving_on_request(self.progress.say) as asked:
            self.progress.board(self.board)
            outcomes = self._train(asked)
            self.progress.board(None)
        self._tell_outcome(fresh=not before)
        if lost := [name for name, outcome in outcomes.items() if outcome.lost]:
            self.progress.say(
                f"not all was written of {', '.join(lost)}.\nMake room, and repeat the command: a trial that has not "
                "ended goes on after its newest whole checkpoint."
            )
        failed = lost or any(outcome.status == "failed" for outcome in outcomes.values())
        return cli.EXIT_FAILED if failed else cli.EXIT_OK

    # ---- training ----------------------------------------------------------------------------------------------

    def _train(self, asked: Callable[[], bool]) -> dict[str, Any]:
        outcomes: dict[str, Any] = {}
        train = self._trainer(asked)
        if self.sweep.search is None:
            return {} if all(map(self._ended, self.trials)) else train(self.trials)
        for number in range(self.sweep.search.waves):
            wave = self._wave(number)
            if not wave:
                self.progress.say("the ranges hold no more trials: the search ends here")
                break
            if not all(map(self._ended, wave)):
                outcomes |= train(wave)
            if asked() or not all(map(self._ended, wave)):
                break
        return outcomes

    def _trainer(self, asked: Callable[[], bool]) -> Callable[[Sequence[Trial]], dict[str, Any]]:
        """Trains trials; what all of them share is loaded by the first call, and kept."""
        kept: list[Any] = []

        def train(trials: Sequence[Trial]) -> dict[str, Any]:
            with self.progress.stage("starting JAX"):
                from jaxlora.config.build import sweeping
                from jaxlora.core.compilation import use_persistent_cache

                use_persistent_cache()
            if not kept:
                kept.append(sweeping.Bases())
            return sweeping.run(
                trials,
                self.path,
                at_once=self.sweep.at_once,
                halving=self.sweep.halving,
                progress=self.progress,
                board=self.board,
                asked_to_leave=asked,
                bases=kept[0],
            )

        return train

    def _wave(self, number: int) -> list[Trial]:
        """The trials of a wave of a search: those that it had when the command was stopped, or new ones."""
        known = self.ledger.get("waves", [])
        if number < len(known):
            wave = make(self.sweep.base, list(known[number].values()), list(known[number]))
        else:
            assert self.sweep.search is not None
            told_so_far = [self._told(trial) for trial in self.trials]
            changes = search.propose(self.sweep.search, number, told_so_far)
            wave = make(self.sweep.base, changes, taken=[trial.name for trial in self.trials])
            self.ledger.note("waves", [*known, {trial.name: trial.changes for trial in wave}])
            self.progress.say(f"wave {number + 1} of {self.sweep.search.waves}: {len(wave)} trials")
        for trial in wave:
            self.board.add(trial.name, told(trial.changes))
            self._remember(trial)
        self.trials += wave
        self._compare()
        return wave

    def _compare(self) -> None:
        """Has TensorBoard show what differs between the trials."""
        from jaxlora.runs.writers import compare_in_tensorboard

        keys = {key for trial in self.trials for key in trial.changes if not key.startswith("journal.")}
        values = [flat(trial.config) for trial in self.trials]
        differing = {key: [one[key] for one in values] for key in sorted(keys)}
        # A trial without a value in one of the columns is left out of the parallel coordinates.
        logged = [name for name in SHOWN_METRICS if all(_logs(trial.config, name) for trial in self.trials)]
        compare_in_tensorboard(self.path, differing, logged)

    def _told(self, trial: Trial) -> search.Told:
        """What a search is told of an ended trial."""
        record = self._record(trial)
        place = ranking(self.path, [trial])[0]  # of a dropped one, what it was dropped on
        nll = place.nll if math.isfinite(place.nll) else None
        dropped = record["steps"] if self._dropped(trial) else None
        return search.Told(trial.changes, None if record.get("status") == "diverged" else nll, dropped)

    def _record(self, trial: Trial) -> dict[str, Any]:
        folder = self.path / trial.name
        return RunDirectory.read(folder).record if (folder / "config.json").is_file() else {}

    def _dropped(self, trial: Trial) -> bool:
        """Whether a halving has dropped it, and nobody finished it alone since."""
        facts, record = self.ledger.dropped.get(trial.name), self._record(trial)
        return facts is not None and record.get("status") == "preempted" and record["steps"] >= facts["step"]

    def _ended(self, trial: Trial) -> bool:
        """Whether the sweep has nothing more to do for it."""
        return self._record(trial).get("status") in ENDED or self._dropped(trial)

    def _remember(self, trial: Trial) -> None:
        """Shows a trial as its folder has it, before anything is done about it."""
        record, row = self._record(trial), self.board.rows[trial.name]
        row.step = record.get("steps", 0)
        row.total = row.step if record.get("status") in ENDED else trial.config.train.max_steps
        row.last, row.best = (record.get("last") or {}).get("eval/nll"), record.get("best")
        if self._ended(trial):
            row.state = "dropped" if self._dropped(trial) else record["status"]

    # ---- what a person reads -----------------------------------------------------------------------------------

    def _tell_plan(self) -> None:
        """What will be done."""
        sweep, stacks = self.sweep, groups(self.trials)
        rows: list[tuple[str, Any]] = [("sweep folder", self.path), ("base", sweep.base.model.path)]
        if sweep.search:
            rows.append(("trials", _told_search(sweep.search)))
        else:
            rows.append(
                (
                    "trials",
                    f"{len(self.trials)} in {_counted(len(stacks), 'group')} of those that may be stacked",
                )
            )
        if ended := sum(map(self._ended, self.trials)):
            rows.append(("ended", f"{ended} of them, before"))
        rows.append(("halving", _told_halving(sweep)))
        rows.append(("to go on", f"{self.command} (should it be interrupted)"))
        self.progress.table("what will be done", rows)

    def _tell_outcome(self, fresh: bool) -> None:
        """The ranking, and what follows from it.

        Args:
            fresh: whether all of it was done by this call.
        """
        places = ranking(self.path, self.trials)
        unfinished = [trial.name for trial in self.trials if not self._ended(trial)]
        header = ("trial", "eval nll", "against the best (95 %)", "at step", "steps", "state")
        self.progress.table("ranking", [self._ranked(place, places[0]) for place in places], header=header)
        rows: list[tuple[str, Any]] = []
        if places and places[0].rows is not None:
            winner = self.path / places[0].trial.name
            rows.append(("the best", f"{places[0].trial.name}: {winner / 'best'}"))
            rows.append(("try it", f"python -m jaxlora.generate --run {shlex.quote(str(winner))}"))
        if not unfinished:
            rows += [("next" if not i else "", line) for i, line in enumerate(advice(places))]
        if fresh and not unfinished and (line := self._time()):
            rows.append(("time", line))
        rows.append(("curves", f"tensorboard --logdir {shlex.quote(str(self.path))}"))
        rows.append(("to go on" if unfinished else "again", self.command))
        self.progress.table("what came of it", rows)

    def _ranked(self, place: Place, winner: Place) -> tuple[str, ...]:
        record = place.record
        if place is winner:
            against = "" if place.rows is None else "the best"
        elif place.behind is None:
            against = "" if place.rows is None else "other examples"
        else:
            margin = TIED * place.behind.standard_error
            against = f"{place.behind.mean:+.4f} ± {margin:.4f}{', tied' if place.tied else ''}"
        nll = f"{place.nll:.4f}" if place.rows is not None else "-"
        state = "dropped" if self._dropped(place.trial) else record.get("status", "waiting").replace("_", " ")
        step = f"{place.step:,}" if place.rows is not None else "-"
        return (place.trial.name, nll, against, step, f"{record.get('steps', 0):,}", state)

    def _time(self) -> str:
        """How long it took, and what is estimated of the same trials one after another."""
        from jaxlora.runs.progress import duration

        board, began = self.board, self.board.began
        made = sum(row.step for row in board.rows.values())
        if began is None or not made:
            return ""
        now = time.monotonic()
        whole, start = now - self.began, began - self.began
        a_step = (now - began) / made
        # A dropped trial would have gone to its end.
        steps = sum(row.total if row.state == "dropped" else row.step for row in board.rows.values())
        alone = len(board.rows) * start + steps * a_step
        return (
            f"{duration(whole)}; one after another an estimated {duration(alone)} ({len(board.rows)} x {start:.0f} s "
            f"until the first step, {steps:,} x {1000 * a_step:.1f} ms a step)"
        )


def _logs(config: "Config", name: str) -> bool:
    """Whether a run logs a metric."""
    if name == "train_eval/nll":
        return config.eval.train_examples > 0
    return not name.startswith("eval/") or name.removeprefix("eval/") in config.eval.metrics


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"


def _told_search(found: search.Search) -> str:
    return f"{found.waves} waves of {found.trials} trials, proposed by Optuna ({found.sampler})"


def _told_halving(sweep: Sweep) -> str:
    halving = sweep.halving
    if halving is None:
        return "none: all go to their end"
    rungs = ", ".join(f"{100 * rung:g} %" for rung in halving.rungs)
    ties = "ties too" if halving.drop_ties else "ties stay"
    return f"at {rungs} of a run the best 1/{halving.eta:g} are kept ({ties})"


def _list(sweep: Sweep) -> None:
    """The trials and their groups."""
    from jaxlora.runs.progress import Progress

    with Progress(interactive=False) as progress:
        if sweep.search:
            progress.table(
                _told_search(sweep.search),
                [(key, *map(shown, found.values), found.kind) for key, found in sweep.search.ranges.items()],
            )
            return
        stacks = groups(sweep.trials)
        progress.say(
            f"{_counted(len(sweep.trials), 'trial')} in {_counted(len(stacks), 'group')}; the trials of a group are "
            f"trained together, {'as many as fit' if not sweep.at_once else sweep.at_once} at once"
        )
        progress.say(f"halving: {_told_halving(sweep)}")
        for number, group in enumerate(stacks, 1):
            apart = _apart(group, stacks)
            rows = [(trial.name, told(trial.changes) or "the base config") for trial in group]
            title = f"group {number}: {_counted(len(group), 'trial')}" + (f", with {apart}" if apart else "")
            progress.table(
                title, rows if any(name != what for name, what in rows) else [row[:1] for row in rows]
            )


def _apart(group: Sequence[Trial], stacks: Sequence[Sequence[Trial]]) -> str:
    """What sets a group apart from the others."""
    every = [dict(stack_key(stack[0].config)) for stack in stacks]
    own = dict(stack_key(group[0].config))
    differing = [key for key in own if any(other.get(key) != own[key] for other in every)]
    return ", ".join(f"{key} = {shown(own[key])}" for key in differing)


if __name__ == "__main__":
    cli.run(main)
