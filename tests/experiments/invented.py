"""Run folders that no machine trained: curves by formula, in the files that a run would write.

    python tests/experiments/invented.py runs/notebook

writes eighteen of them, which imitate the eighteen runs of configs/notebook.py. Their configs are the real ones; their
curves are invented, so that each shows what was written down about that run.
"""

import calendar
import json
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]

EPOCH = 3000
"""Steps of an epoch at batch 128."""

EXAMPLES = 120


@dataclass(frozen=True)
class Invention:
    """How a run went.

    Attributes:
        speed: how far a step goes at the usual rate. start, end: train nll before and after endless training.
        eval_start, eval_end: likewise of eval nll; eval_speed: how much faster it gets there than train nll.
        rise: what eval nll rises by, from its best at the step `turn` to the end.
        noise: standard deviation of train nll around its course.
        spike: (step, height), which wears off over 300 steps. diverges: the step from which the loss rises.
        norm_rise: factor from the first gradient norm to the last. small_spikes: steps of rises by a quarter nat.
        stops: the step of an early stop; changes: keys of the config besides those of the notebook.
        seed: of the run's own noise.
    """

    speed: float = 1.0
    start: float = 2.6
    end: float = 0.4
    eval_start: float = 2.3
    eval_end: float = 1.49
    eval_speed: float = 6.0
    rise: float = 0.0
    turn: int = 0
    noise: float = 0.04
    spike: tuple[int, float] | None = None
    diverges: int | None = None
    norm_rise: float = 1.0
    small_spikes: tuple[int, ...] = ()
    stops: int | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    seed: int = 0


USUAL = Invention()
LARGE = replace(USUAL, start=1.9, end=0.7, eval_start=1.6, eval_end=1.2)
MISTRAL = replace(USUAL, start=1.7, end=0.75, eval_start=1.4, eval_end=1.05)

NOTEBOOK = {
    "Nov22_10-57": USUAL,
    "Nov22_14-28": replace(USUAL, speed=0.85, eval_speed=14.0),
    "Nov22_18-58": replace(USUAL, speed=0.45),
    "Nov22_21-31": replace(USUAL, speed=0.3, end=0.8, eval_end=1.78),
    "Nov22_22-20": replace(USUAL, speed=0.45, eval_speed=14.0),
    "Nov23_15-59": replace(USUAL, speed=0.5, end=0.45),
    "Nov23_19-53": replace(USUAL, speed=0.15, eval_speed=40.0, spike=(4096, 2.5)),
    "Nov23_21-37": replace(USUAL, eval_end=1.42, eval_speed=1.5),
    "Nov23_23-30": replace(USUAL, speed=1.0),
    "Nov24_23-30": replace(USUAL, norm_rise=5.0, small_spikes=(3210, 5400, 7650, 9800)),
    "Nov25_09-19": replace(USUAL, end=0.5, eval_end=1.54),
    "Nov25_12-25": replace(USUAL, speed=0.68, end=0.42, eval_end=1.52),
    "Nov22_23-06": replace(
        LARGE,
        rise=0.04,
        turn=4500,
        eval_speed=20.0,
        changes={"eval.every": 1500, "checkpoint.every": 1500},
    ),
    "Nov23_08-13": replace(LARGE, end=0.46, rise=0.02, turn=4500, eval_end=1.2, eval_speed=20.0),
    "Nov24_02-27": replace(LARGE, speed=1.2, eval_speed=20.0),
    "Nov24_22-17": replace(LARGE, diverges=1500),
    "Nov24_10-49": MISTRAL,
    "Nov25_02-30": replace(
        MISTRAL,
        stops=1500,
        rise=0.03,
        turn=500,
        eval_speed=60.0,
        changes={"stop.patience": 2, "stop.min_steps": 0},
    ),
}
"""What came of each run of configs/notebook.py, by its name."""


def rates(config: dict[str, Any], total: int) -> np.ndarray:
    """[total] learning rates: linear warmup, cosine decay."""
    optim = config["optim"]
    steps, warmup = np.arange(total), optim["warmup_steps"]
    course = np.clip((steps - warmup) / max(1, total - warmup), 0, 1)
    return optim["learning_rate"] * np.where(
        steps < warmup, steps / max(1, warmup), 0.5 + 0.5 * np.cos(np.pi * course)
    )


def write_run(folder: Path, config: dict[str, Any], made: Invention, total: int) -> Path:
    """Writes config.json, record.json, metrics.jsonl and eval/ of one run.

    Args:
        config: as config.json holds it. total: steps it was to take.
    """
    draw = np.random.default_rng([made.seed, *folder.name.encode()])
    rate = rates(config, total)
    done = np.cumsum(rate) / (2e-4 * EPOCH / 4) * made.speed  # in quarters of an epoch at the usual rate
    level = made.end + (made.start - made.end) / (1 + done)
    held_out = made.eval_end + (made.eval_start - made.eval_end) / (1 + made.eval_speed * done)
    steps = np.arange(1, total + 1)
    if made.rise:
        held_out = held_out + made.rise * np.clip(
            (steps - made.turn) / max(1, (made.stops or total) - made.turn), 0, 1
        )
    nll = level + made.noise * draw.normal(size=total)
    norm = 0.6 * made.norm_rise ** (steps / total) * np.exp(0.1 * draw.normal(size=total))
    if made.spike:
        at, height = made.spike
        nll += np.where(steps >= at, height * np.exp(-(steps - at) / 100), 0)
    for at in made.small_spikes:
        nll[at - 1 : at + 9] += 0.25
    if made.diverges:
        nll += np.clip((steps - made.diverges) / 400, 0, None) ** 2
        held_out = held_out + np.clip((steps - made.diverges) / 400, 0, None) ** 2
    last = made.stops or total
    status, reason = ("stopped_early", f"{config['stop']['patience']} evaluations without improvement")
    if made.diverges:
        last = made.diverges + int(np.argmax(nll[made.diverges :] > 1.6 * nll[0]))
        status, reason = (
            "diverged",
            f"the median nll of the last 32 steps is {nll[last - 1]:.4g}, the first was {nll[0]:.4g}",
        )
    elif not made.stops:
        status, reason = "finished", f"all {total:,} steps"

    (folder / "eval").mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    lines, evaluations = _lines(folder, config, made, last, nll, norm, rate, held_out)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    best = min(evaluations, key=lambda one: one["eval/nll"], default=None)
    started = calendar.timegm(time.strptime(f"2025 {folder.name[:11]}", "%Y %b%d_%H-%M"))
    record = {
        "started": started,
        "status": status,
        "reason": reason,
        "steps": last,
        "total_steps": total,
        "best": best,
        "last": evaluations[-1] if evaluations else None,
        "seconds": 3600.0,
        "versions": {"jaxlora": "0.1.0"},
        "devices": "8 x TPU v4",
        "data": {"train": {"fingerprint": "5eed" * 8}, "eval": {"fingerprint": "e7a1" * 8}},
        "baseline": config["journal"]["baseline"],
        "hypothesis": config["journal"]["hypothesis"],
    }
    (folder / "record.json").write_text(json.dumps(record, indent=2) + "\n")
    return folder


def _lines(folder, config, made, last, nll, norm, rate, held_out):
    shared = np.random.default_rng(7)  # the same examples for every run
    tokens, hard = shared.integers(20, 300, EXAMPLES), shared.normal(0, 0.5, EXAMPLES)
    hard -= tokens @ hard / tokens.sum()
    own = np.random.default_rng([1, *folder.name.encode()])
    habit = 0.05 * own.normal(size=EXAMPLES)
    habit -= tokens @ habit / tokens.sum()
    smoothing = config["optim"]["label_smoothing"]
    lines, evaluations = [], []
    for step in range(1, last + 1):
        value = float(nll[step - 1])
        if made.spike and step == made.spike[0]:
            median = float(np.median(nll[step - 33 : step - 1]))
            lines.append(
                {"step": step, "train/spike": 25.0, "train/spike_kind": "loss", "train/spike_median": median}
            )
        if step % config["log"]["every"] == 0 or step in (1, last):
            lines.append(
                {
                    "step": step,
                    "train/loss": value + 15 * smoothing,
                    "train/nll": value,
                    "train/token_accuracy": float(np.exp(-value / 2)),
                    "train/grad_norm": float(norm[step - 1]),
                    "train/learning_rate": float(rate[step - 1]),
                    "train/tokens": 60000,
                    "train/tokens_per_second": 50000.0,
                }
            )
        if step % config["eval"]["every"] == 0 or step == last:
            losses = held_out[step - 1] + hard + habit + 0.01 * own.normal(size=EXAMPLES)
            mean = float(tokens @ losses / tokens.sum())
            entry = {"step": step, "eval/nll": mean}
            evaluations.append(entry)
            lines.append({**entry, "eval/perplexity": float(np.exp(mean))})
            rows = zip(range(EXAMPLES), losses.tolist(), tokens.tolist(), strict=True)
            (folder / "eval" / f"eval-{step:08d}.jsonl").write_text(
                "".join(json.dumps({"example": e, "nll": v, "tokens": t}) + "\n" for e, v, t in rows)
            )
    return lines, evaluations


def notebook(root: Path) -> list[Path]:
    """Writes all eighteen under a folder."""
    from jaxlora.config.load import load_config
    from jaxlora.config.schema import to_dict

    written = []
    for name, made in NOTEBOOK.items():
        config = to_dict(load_config(f"{ROOT}/configs/notebook.py:{name}"))
        for key, value in made.changes.items():
            section, _, last = key.partition(".")
            config[section][last] = value
        total = round(EPOCH * config["train"]["epochs"] * 128 / config["train"]["batch_size"])
        written.append(write_run(root / name, config, made, total))
    return written


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    for folder in notebook(Path(sys.argv[1])):
        print(folder)
