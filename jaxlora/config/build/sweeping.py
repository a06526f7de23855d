"""A sweep: its trials in groups, each group in stacks that fit, each stack trained to its end."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlora.config.build import inputs, programs, stacking, wiring
from jaxlora.config.build.inputs import Data, Model
from jaxlora.config.build.trialing import Board, OpenTrial, Outcome, Prepared, alone
from jaxlora.config.schema import Config, defaults, to_dict
from jaxlora.parallel import sharding
from jaxlora.runs.directory import CONFIG, ENDED, RunDirectory
from jaxlora.runs.progress import Progress
from jaxlora.sweeps import halving as halvings
from jaxlora.sweeps.ledger import Ledger, Waiting
from jaxlora.sweeps.lockstep import Company, Lane, Lockstep, layout
from jaxlora.sweeps.stack import Stack
from jaxlora.sweeps.trials import Halving, Trial, groups
from jaxlora.training.events import Stop
from jaxlora.training.loop import Rung


class Bases:
    """The base and the data that were used last, so that what comes after does not load them again."""

    def __init__(self) -> None:
        self._base: tuple[Any, Any] = (None, None)
        self._data: dict[Any, Data] = {}

    def base(self, config: Config, model: Model, progress: Progress) -> Any:
        """The parameters on the devices; those of another model or mesh are let go first."""
        chosen = config.model
        kept = (chosen.dtype, chosen.quantize, chosen.quantize_embeddings)
        key = (chosen.path, chosen.revision, *kept, model.mesh)
        if self._base[0] != key:
            self._base = (None, None)
            with progress.stage("loading the base") as stage:
                self._base = (key, inputs.base(model, stage))
        return self._base[1]

    def data(self, config: Config, model: Model, progress: Progress) -> Data:
        """Both data sets, in the order of the config's seed."""
        seed = None if config.data.eval else config.seed  # without data.eval it draws what is held out
        key = (config.model.path, config.model.revision, config.data, config.train.batch_size,
               config.eval.batch_size, config.eval.max_examples, seed)  # fmt: skip
        if key not in self._data:
            with progress.stage("reading the data") as stage:
                encoder = inputs.encoder(model, config.data.train_on)
                self._data[key] = inputs.data(config, encoder, progress.say, stage)
        data = self._data[key]
        return dataclasses.replace(data, train=data.train.with_seed(config.seed))


def run(
    trials: Sequence[Trial],
    folder: Path,
    *,
    at_once: int,
    halving: Halving | None,
    progress: Progress,
    board: Board,
    asked_to_leave: Callable[[], bool],
    bases: Bases,
) -> dict[str, Outcome]:
    """Trains trials, each into its own folder; goes on with whatever lies there.

    Trials that may be one stack are trained together, as many at once as fit; what may not makes groups, which are
    trained one after the other.

    Args:
        trials: all different, with different names.
        folder: the sweep's.
        at_once: trials in a stack at most; 0 is as many as fit.
        halving: who is dropped on the way; None for nobody. Trials of one group that are begun together are compared
            with each other, whether they fit at once or not.
        progress: stages and lines that are of no single trial.
        board: what is shown of each.
        asked_to_leave: whether all are to save and end.
        bases: what was loaded before.
    Returns:
        What came of each trial, by name.
    Raises:
        InputError: something is wrong with a trial, its folder, or the sweep's; or not even one fits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(folder)
    ledger.remember(trials)
    found: dict[str, Outcome] = {}
    waiting: list[_Group] = []
    for members in groups(trials):
        outcomes = {trial.name: _outcome(folder, trial, ledger) for trial in members}
        found |= outcomes
        for name, outcome in outcomes.items():
            board.state(name, _state(outcome), outcome.reason)
        if any(not outcome.ended for outcome in outcomes.values()):
            waiting.append(_Group(members, folder, ledger, halving, progress, board, bases))
    lost: set[str] = set()
    for group in waiting:
        lost |= group.train(at_once, asked_to_leave)
    for trial in trials:
        if not found[trial.name].ended:
            found[trial.name] = _outcome(folder, trial, ledger, trial.name in lost)
    return found


def _state(outcome: Outcome) -> str:
    if outcome.rung is not None:
        return "dropped"
    return outcome.status if outcome.ended else "waiting"


def _outcome(folder: Path, trial: Trial, ledger: Ledger, lost: bool = False) -> Outcome:
    """What the trial's folder says of it."""
    path = folder / trial.name
    if not (path / CONFIG).is_file():
        return Outcome("waiting", "not begun yet", 0, None, None, None, ended=False)
    record = RunDirectory.read(path).record
    status, step = record.get("status", "waiting"), record.get("steps", 0)
    dropped = ledger.dropped.get(trial.name)
    gone = dropped is not None and status == "preempted" and step >= dropped["step"]
    return Outcome(
        status,
        record.get("reason") or "",
        step,
        record.get("best"),
        record.get("last"),
        dropped["rung"] if dropped and gone else None,
        ended=status in ENDED or gone,
        lost=lost,
    )


class _Group:
    """Trials that may be one stack, checked before anything is trained.

    Args: as for `run`.
    """

    def __init__(
        self,
        trials: Sequence[Trial],
        folder: Path,
        ledger: Ledger,
        halving: Halving | None,
        progress: Progress,
        board: Board,
        bases: Bases,
    ):
        self._folder, self._ledger, self._halving = folder, ledger, halving
        self._progress, self._board, self._bases = progress, board, bases
        self._model = model = inputs.model(trials[0].config)
        self._prepared: dict[str, Prepared] = {}
        for trial in trials:
            config = trial.config
            given = programs.given_adapter(config, model)
            data = bases.data(config, model, progress)
            wiring.check_names(config, data)
            total = inputs.total_steps(config, data.train)
            if halving is not None:
                halving.check(trial, total)
            self._prepared[trial.name] = Prepared(trial, data, total, given)
        first = self._prepared[trials[0].name]
        self._start: programs.Starter | None = None
        self._fitted: dict[Any, stacking.Fitted] = {}
        self._lost: set[str] = set()
        self._answers = wiring.answers(trials[0].config, model, first.data, progress.say)

    def train(self, at_once: int, asked_to_leave: Callable[[], bool]) -> set[str]:
        """Trains those that have not ended; names those of which not all could be written."""
        stacks = [
            (i, names) for i, names in enumerate(self._ledger.stacks) if set(names) & set(self._prepared)
        ]
        known = {name for _, names in stacks for name in names}
        fresh = [name for name in self._prepared if name not in known]
        if asked_to_leave():
            return self._lost
        for name in self._prepared:
            if not self._ended(name):
                self._board.state(name, "compiling")
        if fresh:
            new = _waves(fresh, self._fit(fresh, len(fresh), at_once).at_once)
            first = len(self._ledger.stacks)
            self._ledger.add_stacks(new)
            stacks += [(first + i, names) for i, names in enumerate(new)]
        while not asked_to_leave():
            on_their_way = [stack for stack in stacks if not all(map(self._rests, stack[1]))]
            for number, names in on_their_way:
                if not asked_to_leave():
                    left = len(self._left(names))
                    self._train(number, names, self._fit(names, left, left), asked_to_leave)
            if not on_their_way and not self._decide_for_several([number for number, _ in stacks]):
                break
        return self._lost

    def _fit(self, names: Sequence[str], trials: int, at_once: int) -> stacking.Fitted:
        """What these are trained with: a stack's own trials decide, so that others that are added change nothing."""
        members = [self._prepared[name] for name in names]
        form = stacking.form([m.trial.config for m in members], self._model, [m.total for m in members])
        if form.key not in self._fitted:
            self._fitted[form.key] = stacking.fit(form, trials, at_once, self._answers, self._progress)
        return self._fitted[form.key]

    def _left(self, names: Sequence[str]) -> tuple[str, ...]:
        """The trials that have a slot where a stack goes on, as far as the records know; () where all have ended."""
        outcomes = {name: _outcome(self._folder, self._prepared[name].trial, self._ledger) for name in names}
        made = [outcome.step for outcome in outcomes.values() if not outcome.ended]
        ended = {name: self._ended_at(name) for name in names if outcomes[name].ended}
        return layout(names, ended, min(made), sharding.trial_devices(self._model.mesh)) if made else ()

    def _rests(self, name: str) -> bool:
        """Whether nothing is to be trained of a trial: it has ended, or waits at a rung for those of other stacks."""
        outcome = _outcome(self._folder, self._prepared[name].trial, self._ledger)
        waiting = self._ledger.waiting(name)
        return outcome.ended or (
            waiting is not None and (outcome.status, outcome.step) == ("preempted", waiting.step)
        )

    def _ended(self, name: str) -> bool:
        return _outcome(self._folder, self._prepared[name].trial, self._ledger).ended

    def _train(
        self, number: int, names: Sequence[str], fitted: stacking.Fitted, asked_to_leave: Callable[[], bool]
    ) -> None:
        """Trains one stack to the ends of its trials."""
        progress, model = self._progress, self._model
        base = self._bases.base(fitted.form.config, model, progress)
        ended = {name: self._ended_at(name) for name in names if self._ended(name)}
        parts = sharding.trial_devices(model.mesh)
        with contextlib.ExitStack() as files:
            opened: dict[str, OpenTrial] = {}
            for name in names:
                if name not in ended:
                    opened[name] = files.enter_context(
                        OpenTrial(
                            self._prepared[name],
                            self._folder,
                            model,
                            base,
                            self._starter(base),
                            fitted,
                            self._board,
                            progress,
                        )
                    )
            made = min(trial.step for trial in opened.values())
            stack = Stack(model.mesh, fitted.form.like, layout(names, ended, made, parts))
            for name, trial in opened.items():
                stack.put(name, trial.take_state())

            def batches(steps: Mapping[str, int]) -> Any:
                if not fitted.form.own_batches:
                    name, step = next(iter(steps.items()))
                    return opened[name].batch(step)
                host = [opened[n].host_batch(steps[n]) if n in steps else None for n in stack.names]
                return stacking.put_batches(fitted.form, host)

            def compare(rung: int, lanes: Sequence[Lane]) -> dict[str, Stop]:
                return self._compare(number, rung, lanes, opened, stack)

            def on_end(lane: Lane, end: Stop) -> None:
                state = stack.take(lane.name, lane.ranks)
                dropped = self._ledger.dropped.get(lane.name)
                gone = dropped is not None and end.reason == dropped["reason"]
                waits = end.status == "preempted" and not gone and self._ledger.waiting(lane.name) is not None
                shown_as = "dropped" if gone else "waiting" if waits else ""
                whole = opened[lane.name].end(end, int(state.step), shown_as)
                (self._lost.discard if whole else self._lost.add)(lane.name)
                if end.status in ENDED:
                    ended[lane.name] = int(state.step)
                elif dropped is not None and gone:
                    ended[lane.name] = dropped["made"]

            company = Company(
                fitted.train,
                base,
                batches,
                lambda made: layout(names, ended, made, parts),
                compare,
                lambda rung: self._ledger.rung(self._ledger.cohort(number), rung) is not None,
                on_end,
                asked_to_leave,
            )
            lockstep = Lockstep(stack, company)
            for name, trial in opened.items():
                rungs = self._rungs(trial.prepared.total)
                lockstep.lanes.append(trial.lane(stack, rungs, lambda _: lockstep.leaving))
                self._board.state(name, "training")
            try:
                lockstep.run()
            except BaseException as error:
                for trial in opened.values():
                    trial.fail(error)
                raise

    def _starter(self, base: Any) -> programs.Starter:
        """One for all stacks of the group: their trials' first states are made by the same programs."""
        self._start = self._start or programs.Starter(self._model, base)
        return self._start

    def _ended_at(self, name: str) -> int:
        """The step of its stack at which a trial ended."""
        outcome = _outcome(self._folder, self._prepared[name].trial, self._ledger)
        return outcome.step if outcome.rung is None else self._ledger.dropped[name]["made"]

    def _rungs(self, total: int) -> dict[int, int]:
        """Step -> number of the rung, from 1, of a run of `total` steps."""
        if self._halving is None:
            return {}
        steps = {self._halving.step(i, total): i + 1 for i in range(len(self._halving.rungs))}
        return {step: rung for step, rung in steps.items() if step < total}

    def _compare(
        self, number: int, rung: int, lanes: Sequence[Lane], opened: Mapping[str, OpenTrial], stack: Stack
    ) -> dict[str, Stop]:
        """Why those of a stack that do not go on from a rung stop, now or for a while; it is decided once."""
        cohort = self._ledger.cohort(number)
        dropped = self._ledger.rung(cohort, rung)
        if dropped is None:
            steps = {lane.name: lane.wish.step for lane in lanes if isinstance(lane.wish, Rung)}
            made = max(steps.values())
            there = {
                name: Waiting(rung, step, made, opened[name].judged(stack)) for name, step in steps.items()
            }
            if len(cohort) > 1:
                for name, waiting in there.items():
                    self._ledger.wait(name, waiting)
                why = "waits at rung {} (step {:,}) for the trials that did not fit beside it"
                return {
                    name: Stop("preempted", why.format(rung, waiting.step)) for name, waiting in there.items()
                }
            dropped = self._decide(cohort, rung, there)
        return {name: Stop("preempted", facts["reason"]) for name, facts in dropped.items()}

    def _decide(
        self, cohort: Sequence[int], rung: int, there: Mapping[str, Waiting]
    ) -> Mapping[str, Mapping[str, Any]]:
        """Decides who is dropped at a rung; it is noted before anybody acts on it."""
        assert self._halving is not None
        whys = halvings.dropped(self._halving, {name: waiting.columns for name, waiting in there.items()})
        dropped = {}
        for name, why in whys.items():
            step = there[name].step
            self._ledger.keep_judged(name, step, there[name].columns)
            dropped[name] = {
                "rung": rung,
                "step": step,
                "made": there[name].made,
                "reason": f"dropped at rung {rung} (step {step:,}): {why}; to finish it alone: "
                f"python -m jaxlora.train --workdir {self._folder / name}",
            }
        self._ledger.decide(cohort, rung, dropped)
        told = f"{len(there) - len(whys)} of {len(there)} trials go on"
        self._board.say(f"rung {rung}: {told}" + (f"; dropped: {', '.join(whys)}" if whys else ""))
        return dropped

    def _decide_for_several(self, numbers: Sequence[int]) -> bool:
        """Compares trials of several stacks that wait for each other; whether there were any."""
        for cohort in self._ledger.cohorts:
            names = [name for number in cohort if number in numbers for name in self._ledger.stacks[number]]
            waiting = {name: at for name in names if (at := self._ledger.waiting(name)) is not None}
            if not waiting:
                continue
            rung = min(at.rung for at in waiting.values())
            there = {name: at for name, at in waiting.items() if at.rung == rung}
            dropped = self._ledger.rung(cohort, rung)  # perhaps before a kill
            if dropped is None:
                dropped = self._decide(cohort, rung, there)
            for name in there:
                if name in dropped and not self._ended_by_itself(name):
                    config = to_dict(alone(self._prepared[name].trial.config))
                    with RunDirectory.open(self._folder / name, config, defaults()) as run:
                        run.update_record(reason=dropped[name]["reason"])
                    self._board.state(name, "dropped", dropped[name]["reason"])
                self._ledger.end_wait(name)
            return True
        return False

    def _ended_by_itself(self, name: str) -> bool:
        return RunDirectory.read(self._folder / name).record.get("status") in ENDED


def _waves(names: Sequence[str], at_once: int) -> list[list[str]]:
    """Stacks of at most so many, all of one size but the last: those of one size have one program."""
    count = math.ceil(len(names) / at_once)
    size = math.ceil(len(names) / count)
    return [list(names[i : i + size]) for i in range(0, len(names), size)]
