"""Runs of Hugging Face's Trainer (and TRL's): trainer_state.json, adapter_config.json, TensorBoard's event files.

training_args.bin is a pickle, which runs code when it is read: it is left alone. What it holds is in the event files
too, as text, and is read from there.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlora.experiments.imports.events import Events, event_files, read_events
from jaxlora.experiments.imports.schedule import recovered
from jaxlora.experiments.records import Run, curves, read_notes, read_object, started

STATE, ADAPTER = "trainer_state.json", "adapter_config.json"

ARGUMENTS = {
    "learning_rate": "optim.learning_rate",
    "lr_scheduler_type": "optim.schedule",
    "weight_decay": "optim.weight_decay",
    "label_smoothing_factor": "optim.label_smoothing",
    "adam_beta1": "optim.b1",
    "adam_beta2": "optim.b2",
    "adam_epsilon": "optim.eps",
    "max_grad_norm": "optim.clip_norm",
    "num_train_epochs": "train.epochs",
    "max_length": "data.max_length",
    "max_seq_length": "data.max_length",
    "packing": "data.packing",
    "seed": "seed",
    # How many devices there were is said nowhere, so the whole batch is not known.
    "per_device_train_batch_size": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "optim": "optimizer",
    "bf16": "bf16",
    "fp16": "fp16",
    "neftune_noise_alpha": "neftune_noise_alpha",
}
"""TrainingArguments and SFTConfig -> our keys; what has none keeps its name."""

ADAPTERS = {
    "r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "target_modules": "lora.targets",
    "use_dora": "lora.use_dora",
    "base_model_name_or_path": "model.path",
    "revision": "model.revision",
}
"""adapter_config.json -> our keys."""

WANTED = {
    "model.path": "the base",
    "lora.rank": "rank",
    "optim.learning_rate": "learning rate",
    "optim.warmup_steps": "warmup steps",
    "train.batch_size": "batch size",
    "optim.weight_decay": "weight decay",
    "optim.label_smoothing": "label smoothing",
}
"""What is said to be unknown where it is."""


def is_trainer_run(folder: Path) -> bool:
    """Whether the Trainer wrote into the folder."""
    return (folder / STATE).is_file() or next(folder.glob(f"checkpoint-*/{STATE}"), None) is not None


def read_trainer(folder: Path) -> Run:
    """Reads an output folder of the Trainer: the newest state that is in it, and what lies beside it."""
    problems: list[str] = []
    state, file = _newest_state(folder, problems)
    logs = Events()
    for files in (event_files(folder), *map(event_files, sorted(folder.glob("runs/*")))):
        if files:
            logs = read_events(files)  # the newest of several starts
            problems += logs.problems
    config = _adapter(folder, file.parent if file else folder, problems) | arguments(logs)
    history = [
        line for line in state.get("log_history") or () if isinstance(line, Mapping) and "step" in line
    ]
    rows = [row for line in history for row in _rows(line)]
    if not rows and logs.scalars:
        rows = scalar_rows(logs)
        problems.append(f"{STATE} has no curves: they are those of the event files")
    total = int(state.get("max_steps") or 0)
    config |= _of_state(state)
    complete(config, rows, total, problems)
    record = _outcome(state, history, total)
    record |= {"notes": read_notes(folder, {}, problems)}
    train, evaluated = curves(rows)
    return Run(
        name=folder.resolve().name,
        path=folder,
        config=config,
        record=record,
        train=train,
        eval=evaluated,
        source="transformers",
        problems=tuple(problems),
        started=logs.began or started(folder, record) or (file.stat().st_mtime if file else None),
        written=file.stat().st_mtime if file else None,
    )


def arguments(logs: Events) -> dict[str, Any]:
    """The config that the Trainer wrote into its event files as text; {} where it did not."""
    given, model = (_json_text(logs.texts.get(tag, "")) for tag in ("args", "model_config"))
    config = {ours: given[name] for name, ours in ARGUMENTS.items() if given.get(name) is not None}
    if (steps := given.get("max_steps")) and steps > 0:
        config["train.max_steps"] = steps
    warmup, ratio = given.get("warmup_steps"), given.get("warmup_ratio")
    if isinstance(warmup, int | float) and warmup >= 1:
        config["optim.warmup_steps"] = int(warmup)
    elif share := warmup or ratio:  # of the whole run, rounded up, when its length is known
        config["warmup_ratio"] = float(share)
    elif warmup is not None:
        config["optim.warmup_steps"] = 0
    if str(given.get("eval_strategy", "")).endswith("steps") and given.get("eval_steps"):
        config["eval.every"] = given["eval_steps"]
    if given.get("logging_steps"):
        config["log.every"] = given["logging_steps"]
    if model.get("_name_or_path"):
        config["model.path"] = model["_name_or_path"]
    return config


def complete(config: dict[str, Any], rows: list[dict[str, Any]], total: int, problems: list[str]) -> None:
    """Adds what follows from the rest: nll where the loss is one, the schedule where the logged rates leave no choice.

    Args:
        config, rows: changed in place.
        total: steps planned, 0 where that is not known.
        problems: gets a line on what stays unknown, and one on what the losses are.
    """
    if "warmup_ratio" in config and total:
        config["optim.warmup_steps"] = math.ceil(total * config.pop("warmup_ratio"))
    rates = [
        (row["step"], row["train/learning_rate"])
        for row in rows
        if row.get("train/learning_rate") is not None
    ]
    if rates and "optim.learning_rate" not in config:
        steps, values = (
            np.array([step for step, _ in rates]),
            np.array([rate for _, rate in rates], np.float64),
        )
        found = recovered(steps, values, total)
        if found:
            config |= {
                "optim.learning_rate": found.peak,
                "optim.warmup_steps": found.warmup,
                "optim.schedule": found.kind,
            }
            problems.append(
                f"learning rate and warmup are not said; all {len(rates):,} logged rates are those of {found.peak:g}, "
                f"{found.warmup:,} warmup steps, {found.kind}"
            )
        else:
            config["optim.largest_logged_learning_rate"] = float(f"{np.nanmax(values):.4g}")
    smoothing = config.get("optim.label_smoothing")
    if smoothing:
        problems.append(f"losses are smoothed by {smoothing:g}, in evaluation too: they are no nll")
    else:
        for row in rows:
            for split in ("train", "eval"):
                for end in ("", "/nonfinite"):
                    if f"{split}/loss{end}" in row:
                        row.setdefault(f"{split}/nll{end}", row[f"{split}/loss{end}"])
        if smoothing is None and rows:
            problems.append("whether losses are smoothed is not said: they are taken as nll")
    missing = [words for key, words in WANTED.items() if key not in config]
    if missing:
        problems.append(f"not said: {', '.join(missing)}")


def scalar_rows(logs: Events) -> list[dict[str, Any]]:
    """The scalars of event files as rows of `records.curves`."""
    by_step: dict[tuple[int, bool], dict[str, Any]] = {}
    for tag, points in logs.scalars.items():
        name = metric_name(tag)
        for step, value in points.items():
            row = by_step.setdefault((step, name.startswith("train/")), {"step": step})
            row[name] = value if math.isfinite(value) else None
            if row[name] is None:
                row[f"{name}/nonfinite"] = str(value)
    return [by_step[key] for key in sorted(by_step)]


def metric_name(name: str) -> str:
    """What a metric is called here: loss is train/loss, eval_loss and validation/loss are eval/loss."""
    split, _, rest = name.strip().replace(" ", "_").rpartition("/")
    found = re.match(r"(eval|val|valid|validation|test|train)[_./-](?=.)", rest) if not split else None
    if found:
        split, rest = found[1], rest[found.end() :]
    split = {"val": "eval", "valid": "eval", "validation": "eval", "": "train"}.get(split.lower(), split)
    rest = {"lr": "learning_rate", "gradient_norm": "grad_norm", "Loss": "loss"}.get(rest, rest)
    return f"{split}/{rest}"


def _newest_state(folder: Path, problems: list[str]) -> tuple[Mapping[str, Any], Path | None]:
    """The state with the most steps that can be read, and its file."""
    found: list[tuple[int, Mapping[str, Any], Path]] = []
    for file in (folder / STATE, *folder.glob(f"checkpoint-*/{STATE}")):
        if file.is_file():
            state, wrong = read_object(file)
            if wrong:
                problems.append(f"{file.relative_to(folder)}: {wrong}")
            else:
                found.append((int(state.get("global_step") or 0), state, file))
    return max(found, key=lambda item: item[0])[1:] if found else ({}, None)


def _adapter(folder: Path, checkpoint: Path, problems: list[str]) -> dict[str, Any]:
    for place in (folder, checkpoint, *sorted(folder.glob("checkpoint-*"), reverse=True)):
        adapter, wrong = read_object(place / ADAPTER)
        if adapter:
            config = {ours: adapter[name] for name, ours in ADAPTERS.items() if adapter.get(name) is not None}
            targets = config.get("lora.targets")
            if isinstance(targets, list):  # PEFT writes a set, in any order
                config["lora.targets"] = tuple(sorted(map(str, targets)))
            config["lora.scaling"] = "rslora" if adapter.get("use_rslora") else "alpha/r"
            return config
        if wrong and wrong != "is missing":
            problems.append(f"{ADAPTER}: {wrong}")
    return {}


def _of_state(state: Mapping[str, Any]) -> dict[str, Any]:
    config = {}
    if state.get("num_train_epochs"):
        config["train.epochs"] = float(state["num_train_epochs"])
    callbacks = state.get("stateful_callbacks") or {}
    patience = _callback(callbacks, "EarlyStoppingCallback", "args").get("early_stopping_patience")
    return config | ({"stop.patience": patience} if patience else {})


def _outcome(state: Mapping[str, Any], history: list[Mapping[str, Any]], total: int) -> dict[str, Any]:
    """The fields of a record that a state knows."""
    if not state:
        return {}
    steps = int(state.get("global_step") or 0)
    record: dict[str, Any] = {"steps": steps}
    if total:
        record["total_steps"] = total
    callbacks = state.get("stateful_callbacks") or {}
    stopped = _callback(callbacks, "TrainerControl", "args").get("should_training_stop")
    closing = next((line for line in reversed(history) if "train_runtime" in line), None)
    if total and steps >= total:
        record["status"] = "finished"
    elif closing or stopped:
        record["status"] = "stopped_early"
    if closing:
        record["seconds"] = closing["train_runtime"]
    return record


def _callback(callbacks: Mapping[str, Any], name: str, part: str) -> Mapping[str, Any]:
    found = callbacks.get(name)
    found = found[0] if isinstance(found, list) and found else found
    return (found.get(part) or {}) if isinstance(found, Mapping) else {}


def _rows(line: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line of log_history as rows of `records.curves`."""
    if "train_runtime" in line or not isinstance(line["step"], int | float):
        return []  # the closing line: means over the whole run
    values: dict[str, dict[str, Any]] = {"train": {}, "eval": {}}
    for name, value in line.items():
        if name not in ("step", "epoch") and isinstance(value, int | float) and not isinstance(value, bool):
            ours = metric_name(name)
            values["train" if ours.startswith("train/") else "eval"][ours] = value
    # With logging_nan_inf_filter, or in half precision, a loss that is no number is shown as 0.0.
    norm = values["train"].get("train/grad_norm")
    if values["train"].get("train/loss") == 0.0 and norm is not None and not math.isfinite(norm):
        values["train"]["train/loss"] = math.nan
    for found in values.values():
        for name, value in list(found.items()):
            if not math.isfinite(value):
                found |= {name: None, f"{name}/nonfinite": str(float(value))}
    return [{"step": int(line["step"]), **found} for found in values.values() if found]


def _json_text(text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
