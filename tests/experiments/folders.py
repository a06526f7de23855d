"""Small run folders, written as a run writes them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlora.runs.directory import RunDirectory

CONFIG: dict[str, Any] = {
    "model": {"path": "Qwen/Qwen2.5-0.5B-Instruct"},
    "lora": {"rank": 16, "alpha": 32.0},
    "optim": {"learning_rate": 2e-4, "warmup_steps": 10, "weight_decay": 0.01, "label_smoothing": 0.0},
    "train": {"batch_size": 8, "max_steps": 0, "epochs": 3.0},
    "journal": {"baseline": "", "hypothesis": ""},
    "seed": 0,
}


def write_run(
    folder: Path,
    *,
    train: Mapping[int, float] | None = None,
    evaluations: Mapping[int, Mapping[int, float]] | None = None,
    texts: bool = False,
    record: Mapping[str, Any] | None = None,
    **keys: Any,
) -> Path:
    """Writes a run.

    Args:
        train: step -> train/nll; by default 100 steps that fall from 2.
        evaluations: step -> example -> nll (10 tokens each); by default three of 20 examples that fall.
        texts: whether the texts of the examples are kept.
        record: fields of record.json besides those that any run has.
        keys: of the config, with __ for the dot.
    """
    config = {name: dict(value) if isinstance(value, dict) else value for name, value in CONFIG.items()}
    for name, value in keys.items():
        section, _, key = name.rpartition("__")
        (config.setdefault(section, {}) if section else config)[key] = value
    train = {step: 1 + 20 / (20 + step) for step in range(1, 101)} if train is None else train
    if evaluations is None:
        falling = {0: 2.0, 50: 1.6, 100: 1.5}
        evaluations = {step: {e: nll + 0.01 * e for e in range(20)} for step, nll in falling.items()}
    with RunDirectory.open(folder, config) as run:
        run.update_record(
            status="finished",
            steps=max(train, default=0),
            seconds=12.5,
            data={"eval": {"fingerprint": "f" * 32}, "train": {"fingerprint": "a" * 32}},
            devices="1 x cpu",
        )
        run.update_record(**(record or {}))
        for step in sorted({*train, *evaluations}):
            if step in train:
                run.append_metrics(
                    step, {"train/loss": train[step], "train/nll": train[step], "train/grad_norm": 0.5}
                )
            if step in evaluations:
                found = evaluations[step]
                columns = {"example": list(found), "nll": list(found.values()), "tokens": [10] * len(found)}
                run.append_metrics(step, {"eval/nll": sum(found.values()) / max(1, len(found))})
                run.write_evaluation(step, columns)
        if texts:
            numbers = list(range(20))
            columns = {
                "example": numbers,
                "row": numbers,
                "prompt": [f"question {n}" for n in numbers],
                "reference": [f"answer {n}" for n in numbers],
            }
            run.write_evaluation(0, columns, "examples")
    return folder
