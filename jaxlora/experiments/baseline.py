"""What a run is compared with, and what makes that comparison unfair."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from jaxlora.experiments.changes import matters, number, same
from jaxlora.experiments.records import Run

_UNKNOWN = 0


def model_of(run: Run) -> str:
    """The short name of a run's base, such as "Qwen2.5-0.5B-Instruct"; "" where it is not known."""
    return PurePath(str(run.config.get("model.path") or "")).name


def rank_of(run: Run) -> int | None:
    """A run's rank, None where it is not known."""
    rank = run.config.get("lora.rank")
    return int(rank) if isinstance(rank, int | float) else None


def in_order(runs: Sequence[Run]) -> list[Run]:
    """The runs in the order in which they began; those of which that is not known come last, by name."""
    return sorted(runs, key=lambda run: (run.started is None, run.started or 0.0, run.name))


def baselines(runs: Sequence[Run]) -> list[tuple[Run | None, str]]:
    """For each run its baseline, and what is to be said about that choice.

    The baseline is the run that `journal.baseline` names; of several of that name the nearest folder. Where it names
    none, it is the nearest earlier run: of the same model, begun before, not diverged, with curves, and with the fewest
    keys that differ (of those known of both; `changes.IGNORED` do not count); of several the earliest.

    Args:
        runs: in the order in which they began (see `in_order`).
    Returns:
        (baseline or None, "" or a sentence) for each.
    """
    named: dict[str, list[Run]] = {}
    for run in runs:
        named.setdefault(run.name, []).append(run)
    models = np.unique([model_of(run) for run in runs], return_inverse=True)[1]
    usable = np.array([bool(len(run.train.steps) + len(run.eval.steps)) for run in runs], bool)
    usable &= np.array([run.status != "diverged" for run in runs], bool)
    codes = _codes(runs)
    chosen: list[tuple[Run | None, str]] = []
    for index, run in enumerate(runs):
        wanted = str(run.config.get("journal.baseline") or run.record.get("baseline") or "")
        others = [other for other in named.get(wanted, ()) if other is not run]
        if others:
            chosen.append((min(others, key=lambda other: _apart(other, run)), ""))
            continue
        candidates = np.flatnonzero(usable[:index] & (models[:index] == models[index]))
        nearest = _nearest(codes, index, candidates)
        found = None if nearest is None else runs[nearest]
        told = ""
        if wanted == run.name:
            told = f"its baseline is itself ({wanted})"
        elif wanted:
            told = f"its baseline {wanted} is not among these runs"
        if told and found:
            told += f"; compared with the nearest earlier run, {found.name}"
        chosen.append((found, told))
    return chosen


def _codes(runs: Sequence[Run]) -> np.ndarray:
    """[N, K] int32: equal where values are, `_UNKNOWN` where a run does not know the key."""
    keys = sorted({key for run in runs for key in run.config if matters(key)})
    codes = np.zeros((len(runs), len(keys)), np.int32)
    for column, key in enumerate(keys):
        known: dict[Any, int] = {}
        for row, run in enumerate(runs):
            if key in run.config:
                value = run.config[key]
                # True is 1 and 1.0 to a dict, but only the latter two are the same setting.
                codes[row, column] = known.setdefault(
                    (isinstance(value, bool), _hashable(value)), len(known) + 1
                )
    return codes


def _hashable(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value


def _nearest(codes: np.ndarray, index: int, candidates: np.ndarray) -> int | None:
    if not len(candidates):
        return None
    own, others = codes[index], codes[candidates]
    both = (own != _UNKNOWN) & (others != _UNKNOWN)
    differing = ((own != others) & both).sum(axis=1)
    known = both.sum(axis=1)
    # Of runs of which next to nothing is known, few keys differ: that makes them no nearer.
    differing = np.where(known * 2 >= known.max(), differing, codes.shape[1] + 1)
    return int(candidates[int(np.argmin(differing))]) if known.max() else None


def _apart(one: Run, other: Run) -> int:
    """Folders that two paths do not share."""
    a, b = one.path.resolve().parts, other.path.resolve().parts
    shared = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return len(a) + len(b) - 2 * shared


# ---- fairness ------------------------------------------------------------------------------------------------------


def unfair(old: Run, new: Run) -> list[str]:
    """What else differs, which nobody chose: data, hardware, defaults of another version."""
    found = []
    for name, words in (("train", "training data"), ("eval", "eval data")):
        before, after = _fingerprint(old, name), _fingerprint(new, name)
        if before and after and before != after:
            found.append(f"other {words} (fingerprint {after[:8]} instead of {before[:8]})")
    before, after = old.record.get("devices"), new.record.get("devices")
    if before and after and before != after:
        found.append(f"other hardware ({after} instead of {before})")
    versions = _version(old), _version(new)
    if all(versions) and versions[0] != versions[1]:
        found += _defaults(old, new, f"jaxlora {versions[0]} -> {versions[1]}")
    return found


def changed_defaults(old: Run, new: Run) -> list[str]:
    """Keys that differ because a default did: neither run set them, as far as their records say."""
    if _version(old) == _version(new):
        return []
    chosen = [run.record.get("not_default") for run in (old, new)]
    if not all(isinstance(keys, list) for keys in chosen):
        return []
    set_by_hand = {str(key) for keys in chosen for key in keys or ()}
    shared = [key for key in new.config if key in old.config and matters(key)]
    return [key for key in shared if key not in set_by_hand and not same(old.config[key], new.config[key])]


def _defaults(old: Run, new: Run, versions: str) -> list[str]:
    told = [
        f"{versions}: the default of {key} is {_shown(new.config[key])} instead of {_shown(old.config[key])}"
        for key in changed_defaults(old, new)
    ]
    for one, other, words in ((new, old, "new"), (old, new, "gone")):
        keys = [key for key in one.config if key not in other.config and matters(key)]
        if keys:
            values = ", ".join(f"{key} = {_shown(one.config[key])}" for key in keys[:3])
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            told.append(f"{versions}: {words} {'is' if len(keys) == 1 else 'are'} {values}{more}")
    return told or [f"{versions}, with the same settings"]


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else number(value)


def _version(run: Run) -> str:
    versions = run.record.get("versions")
    return str(versions.get("jaxlora") or "") if isinstance(versions, Mapping) else ""


def _fingerprint(run: Run, name: str) -> str:
    data = run.record.get("data")
    part = data.get(name) if isinstance(data, Mapping) else None
    return str(part.get("fingerprint") or "") if isinstance(part, Mapping) else ""


def same_eval_data(old: Run, new: Run) -> bool | None:
    """Whether both were evaluated on the same examples by fingerprint; None where it is not known of both."""
    before, after = _fingerprint(old, "eval"), _fingerprint(new, "eval")
    return before == after if before and after else None
