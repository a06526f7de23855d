"""A stand-in for config.build.sweeping: trials whose curves are a formula, in real run folders, without a device.

A trial's nll falls to a floor that is lowest at a learning rate of 1e-3, the faster the higher the rate; above 0.1 it
diverges. Examples differ from each other far more than trials do, as real ones do.
"""

import dataclasses
import math
import time
from typing import Any

import numpy as np

from jaxlora.config.schema import to_dict
from jaxlora.runs.directory import ENDED, RunDirectory
from jaxlora.sweeps.ledger import Ledger

EXAMPLES, STEPS = 40, 20
FACTS = {"data": {"eval": {"fingerprint": "f"}}}
NOISE = 1e-3


class Bases:
    """Counts how often it was asked for."""


@dataclasses.dataclass
class Outcome:
    status: str
    reason: str
    step: int
    best: dict[str, Any] | None
    last: dict[str, Any] | None
    rung: int | None = None
    lost: bool = False


def nll(rate: float, step: int) -> float:
    floor = 1 + 0.05 * math.log10(rate / 1e-3) ** 2
    return floor + 3 * math.exp(-step * min(1.0, 100 * rate) / 3)


def columns(rate: float, step: int) -> dict[str, Any]:
    examples = np.random.default_rng(1).normal(0, 0.3, EXAMPLES)
    own = np.random.default_rng([step, int(1e6 * rate)]).normal(0, NOISE, EXAMPLES)
    values = nll(rate, step) + examples - examples.mean() + own - own.mean()
    return {"example": range(EXAMPLES), "nll": values, "tokens": [4] * EXAMPLES}


def run(trials, folder, *, at_once, halving, progress, board, asked_to_leave, bases, pace=0.0):
    found: dict[str, Outcome] = {}
    alive = [t for t in trials if not ended(folder, t)]
    for trial in trials:
        if trial not in alive:
            found[trial.name] = outcome(folder, trial)
    runs = {trial.name: RunDirectory.open(folder / trial.name, to_dict(trial.config)) for trial in alive}
    steps = {trial.name: runs[trial.name].record.get("steps", 0) for trial in alive}
    for trial in alive:
        runs[trial.name].update_record(status="running", **FACTS)
        board.state(trial.name, "training")
    for step in range(1, STEPS + 1):
        for trial in list(alive):
            rate, name = trial.config.optim.learning_rate, trial.name
            if step <= steps[name]:
                continue
            time.sleep(pace)
            board.step(name, step, STEPS)
            board.train(name, step=step, nll=nll(rate, step))
            record = {"steps": step}
            if rate > 0.1 and step == 3:
                end(trial, alive, found, runs, folder, board, "diverged", "loss above its start", record)
                continue
            if step % 5 == 0:
                record |= evaluate(runs[name], trial, step, board)
            runs[name].update_record(**record)
            if step == STEPS:
                end(trial, alive, found, runs, folder, board, "finished", f"all {STEPS} steps done", {})
        for rung in range(len(halving.rungs) if halving else 0):
            if step == halving.step(rung, STEPS):
                ranked = sorted(alive, key=lambda t: nll(t.config.optim.learning_rate, step))
                for trial in ranked[halving.kept(len(alive)) :]:
                    reason = f"dropped at rung {rung + 1} (step {step})"
                    facts = {"rung": rung + 1, "step": step, "made": step, "reason": reason}
                    Ledger(folder).decide([len(found)], rung + 1, {trial.name: facts})
                    end(trial, alive, found, runs, folder, board, "dropped", reason, {})
        if asked_to_leave():
            for trial in list(alive):
                end(trial, alive, found, runs, folder, board, "preempted", "asked to leave", {})
    return found


def evaluate(run, trial, step, board) -> dict[str, Any]:
    rate = trial.config.optim.learning_rate
    run.write_evaluation(step, columns(rate, step))
    run.append_metrics(step, {"eval/nll": nll(rate, step)})
    now = {"step": step, "eval/nll": nll(rate, step)}
    best = min((b for b in (run.record.get("best"), now) if b), key=lambda b: b["eval/nll"])
    board.evaluated(trial.name, step, now, best)
    board.say(f"eval at step {step}: nll {now['eval/nll']:.4g}", trial.name)
    return {"best": best, "last": now, "first": run.record.get("first") or now}


def end(trial, alive, found, runs, folder, board, status, reason, record) -> None:
    written = "preempted" if status == "dropped" else status
    runs[trial.name].update_record(status=written, reason=reason, **record)
    runs[trial.name].close()
    board.state(trial.name, status, reason)
    found[trial.name] = outcome(folder, trial)
    alive.remove(trial)


def ended(folder, trial) -> bool:
    file = folder / trial.name
    if not (file / "config.json").is_file():
        return False
    return trial.name in Ledger(folder).dropped or RunDirectory.read(file).record.get("status") in ENDED


def outcome(folder, trial) -> Outcome:
    record = RunDirectory.read(folder / trial.name).record
    return Outcome(
        record["status"], record["reason"], record["steps"], record.get("best"), record.get("last")
    )
