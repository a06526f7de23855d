"""A sweep's config: a base config and what its trials change in it, checked as a whole.

A sweep file is Python with `get_config() -> ConfigDict`, as every config is. It starts from `sweep_config(BASE)` and
says which trials there are:

    config = sweep_config("configs/quickstart.py")
    config.sweep.grid = {"optim.learning_rate": [1e-4, 2e-4, 5e-4], "lora.rank,lora.alpha": [(8, 16.0), (16, 32.0)]}
"""

import ast
import dataclasses
import difflib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from jaxlora.config import keys, load
from jaxlora.config.keys import Allowed, Key
from jaxlora.config.schema import KEYS, Config, find_key, to_dict
from jaxlora.core.errors import InputError
from jaxlora.sweeps.ranges import draws, ranges
from jaxlora.sweeps.search import SAMPLERS, Search
from jaxlora.sweeps.trials import Halving, Trial, changed, check_distinct, flat, named

_RANGES = Allowed(
    "a dict of key: ('log_uniform', LOW, HIGH), ('uniform', LOW, HIGH) or ('choice', VALUE, ...)"
)

SWEEP_KEYS: dict[str, Key] = {
    path: Key(path, kind, default, False, meaning, allowed)
    for path, kind, default, meaning, allowed in (
        (
            "sweep.grid",
            dict,
            {},
            "key -> values, every combination a trial; 'KEY,KEY' -> tuples, for keys that go together",
            Allowed("a dict of key: values"),
        ),
        (
            "sweep.trials",
            list,
            [],
            "trials one by one, each a dict of key: value, with 'name' where one is wanted",
            Allowed("a list of dicts"),
        ),
        (
            "sweep.at_once",
            int,
            0,
            "trials of a group trained at once; 0 is as many as fit",
            keys.at_least(0),
        ),
        ("sweep.random.ranges", dict, {}, "key -> range, of trials drawn by chance", _RANGES),
        ("sweep.random.count", int, 8, "trials drawn", keys.at_least(1)),
        ("sweep.random.seed", int, 0, "of the draws", keys.at_least(0)),
        (
            "sweep.halving.rungs",
            tuple,
            (),
            "fractions of a run after which the worst are dropped, such as (0.25, 0.5); () is never",
            Allowed("a tuple of numbers above 0 and below 1"),
        ),
        (
            "sweep.halving.eta",
            float,
            2.0,
            "the best 1/eta are kept at a rung; at least 2",
            Allowed("a number of at least 2"),
        ),
        (
            "sweep.halving.drop_ties",
            bool,
            False,
            "also drop what is statistically tied with the last kept one",
            keys.SWITCH,
        ),
        ("sweep.search.ranges", dict, {}, "key -> range, of trials that Optuna proposes", _RANGES),
        ("sweep.search.sampler", str, "tpe", "Optuna's sampler", keys.one_of(*SAMPLERS)),
        (
            "sweep.search.waves",
            int,
            4,
            "rounds of proposals, each trained before the next",
            keys.at_least(1),
        ),
        ("sweep.search.trials", int, 8, "trials a wave", keys.at_least(1)),
        ("sweep.search.seed", int, 0, "of the sampler", keys.at_least(0)),
    )
}
"""Dotted name -> the key, for every public key of a sweep beside those of its base."""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A whole sweep, checked.

    Attributes:
        base: the config that trials change.
        trials: given ahead; none where a search proposes them.
        at_once: as the key says. halving, search: None for none.
    """

    base: Config
    trials: tuple[Trial, ...]
    at_once: int
    halving: Halving | None
    search: Search | None


def sweep_config(base: Any) -> Any:
    """A ConfigDict for a sweep file to start from: every key at its default, and no trial yet.

    Args:
        base: the config that trials change: the path of a config file (with `:PARAMETER` where it takes one), or a
            ConfigDict.
    """
    config = ConfigDict(type_safe=False)
    config.base = (
        ConfigDict(load.read_config(os.fspath(base))) if isinstance(base, str | os.PathLike) else base
    )
    config.sweep = ConfigDict(
        _defaults(), convert_dict=False, type_safe=False
    )  # a grid's keys have dots in them
    return config


def _defaults() -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key in SWEEP_KEYS.values():
        section, name = key.path.removeprefix("sweep.").rpartition(".")[::2]
        place = (
            nested.setdefault(section, ConfigDict(convert_dict=False, type_safe=False)) if section else nested
        )
        place[name] = type(key.default)(key.default) if isinstance(key.default, dict | list) else key.default
    return nested


def of_configs(configs: Mapping[str, str]) -> Any:
    """A ConfigDict for a sweep over configs that are there: the first is the base, the trials are what differs.

    Args:
        configs: name of the trial -> path of a config file, with `:PARAMETER` where it takes one.
    """
    read = {name: load.load_config(argument) for name, argument in configs.items()}
    base, *_ = read.values()
    config = sweep_config(next(iter(configs.values())))
    for name, other in read.items():
        before, now = flat(base), flat(other)
        differing = {key: now[key] for key in now if now[key] != before[key]}
        config.sweep.trials.append({"name": name} | differing)
    return config


def find_sweep_key(path: str) -> Key:
    """The key of a dotted name: of the sweep itself, or "base." and one of its base config.

    Raises:
        InputError: there is no such key.
    """
    if path.startswith("base."):
        key = find_key(path.removeprefix("base."))
        return dataclasses.replace(key, path=path)
    if path in SWEEP_KEYS:
        return SWEEP_KEYS[path]
    words = {key.rpartition(".")[2]: key for key in SWEEP_KEYS}
    same = words.get(path.rpartition(".")[2], f"base.{path}" if path in KEYS else None)
    known = [*SWEEP_KEYS, *(f"base.{key}" for key in KEYS)]
    near = [same] if same else difflib.get_close_matches(path, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(SWEEP_KEYS)}, and base.KEY."
    return _raise(f"unknown sweep key {path}: {hint}\nAll keys are listed by python -m jaxlora.sweep --help.")


def _raise(message: str) -> Any:
    raise InputError(message)


def load_sweep(argument: str, overrides: Sequence[str] = ()) -> Sweep:
    """Reads a sweep file, applies overrides, and checks all its trials.

    Args:
        argument: its path, with `:PARAMETER` where it takes one.
        overrides: flags `--config.base.KEY=VALUE` and `--config.sweep.KEY=VALUE`, applied in order.
    Raises:
        InputError: as `load.load_config`; a key of a trial that does not exist; two trials that are the same; no trial
            at all; a halving or a search that cannot work.
    """
    plain = load.read_config(argument)
    if set(plain) != {"base", "sweep"} or not all(isinstance(part, Mapping) for part in plain.values()):
        raise InputError(
            f"{argument} is no sweep: a sweep's config has two parts, base and sweep.\n"
            "Start with config = sweep_config(BASE) from jaxlora.config.sweep; configs/sweeps/ has examples."
        )
    values = _flat(plain["sweep"])
    for path in values:
        find_sweep_key(path)
    for flag in overrides:
        _override(plain["base"], values, flag)
    for path, value in values.items():
        values[path] = tuple(value) if SWEEP_KEYS[path].kind is tuple and isinstance(value, list) else value
    values = {path: key.check(values.get(path, key.default)) for path, key in SWEEP_KEYS.items()}
    base = Config.from_dict(plain["base"])
    halving = None
    if values["sweep.halving.rungs"]:
        rungs = _numbers("sweep.halving.rungs", values["sweep.halving.rungs"])
        halving = Halving(rungs, values["sweep.halving.eta"], values["sweep.halving.drop_ties"])
    search = None
    if values["sweep.search.ranges"]:
        found = ranges("sweep.search.ranges", values["sweep.search.ranges"])
        names = ("sampler", "waves", "trials", "seed")
        search = Search(found, *(values[f"sweep.search.{name}"] for name in names))
    trials = tuple(_trials(base, values, search))
    for trial in trials:
        if halving and trial.config.train.max_steps:
            halving.check(trial, trial.config.train.max_steps)
    return Sweep(base, trials, values["sweep.at_once"], halving, search)


def _flat(nested: Mapping[str, Any], prefix: str = "sweep") -> dict[str, Any]:
    """Dotted key -> value; a dict that is itself a key's value stays whole."""
    found: dict[str, Any] = {}
    for name, value in nested.items():
        path = f"{prefix}.{name}"
        inside = isinstance(value, Mapping) and any(key.startswith(f"{path}.") for key in SWEEP_KEYS)
        found |= _flat(value, path) if inside else {path: value}
    return found


def _override(base: dict[str, Any], values: dict[str, Any], flag: str) -> None:
    match = re.fullmatch(r"--config\.([^=]+)=(.*)", flag, re.DOTALL)
    if match is None:
        raise InputError(
            f"{flag} is no override.\nWrite --config.base.KEY=VALUE or --config.sweep.KEY=VALUE."
        )
    path, text = match[1], match[2]
    key = find_sweep_key(path)
    if path.startswith("base."):
        load.override(base, f"--config.{path.removeprefix('base.')}={text}")
    elif key.kind in (dict, list, tuple):
        try:
            value = ast.literal_eval(text if text else "()")
        except (ValueError, SyntaxError):
            value = text
        values[path] = (value,) if key.kind is tuple and isinstance(value, int | float) else value
    else:
        values[path] = key.check(key.parse(text))


def _numbers(path: str, given: Iterable[Any]) -> tuple[float, ...]:
    given = tuple(given)
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in given):
        raise InputError(f"{path} = {given!r} is not allowed: it must be {SWEEP_KEYS[path].allowed.words}.")
    return tuple(float(value) for value in given)


# ---- trials --------------------------------------------------------------------------------------------------------


def _trials(base: Config, values: Mapping[str, Any], search: Search | None) -> Iterator[Trial]:
    """All trials that are given ahead, the listed ones first.

    Raises:
        InputError: two are the same, or there is none.
    """
    listed = [_listed(entry) for entry in values["sweep.trials"]]
    others = [*_grid(values["sweep.grid"])]
    if values["sweep.random.ranges"]:
        found = ranges("sweep.random.ranges", values["sweep.random.ranges"])
        others += draws(found, values["sweep.random.count"], values["sweep.random.seed"])
    if search and (listed or others):
        raise InputError(
            "sweep.search proposes its own trials, and there are others beside it.\n"
            "Leave out sweep.search.ranges, or sweep.grid, sweep.trials and sweep.random.ranges."
        )
    if not search and not listed and not others:
        raise InputError(
            "the sweep has no trials.\nGive it some: config.sweep.grid = {'optim.learning_rate': [1e-4, 2e-4]}, or "
            "sweep.trials, sweep.random.ranges or sweep.search.ranges."
        )
    trials = make(base, [changes for _, changes in listed] + others, [name for name, _ in listed])
    check_distinct(trials)
    yield from trials


def make(
    base: Config, changes: Sequence[Mapping[str, Any]], names: Sequence[str] = (), taken: Iterable[str] = ()
) -> list[Trial]:
    """Trials from their changes.

    Args:
        names: of the first ones; "" and those that are left out are made from what differs.
        taken: names that may not be used again.
    Raises:
        InputError: a change that cannot be, naming the trial.
    """
    whole = to_dict(base)
    chosen = [*names, *[""] * (len(changes) - len(names))]
    unnamed = iter(named([c for c, name in zip(changes, chosen, strict=True) if not name], taken))
    found = []
    for change, name in zip(changes, chosen, strict=True):
        name = name or next(unnamed)
        try:
            change = {path: find_key(path).check(value) for path, value in change.items()}
            found.append(Trial(name, change, changed(whole, change)))
        except InputError as error:
            raise InputError(f"trial {name}: {error}") from None
    return found


def _listed(entry: Any) -> tuple[str, dict[str, Any]]:
    """A trial of sweep.trials: its name, "" for none, and its changes."""
    if not isinstance(entry, Mapping):
        raise InputError(
            f"sweep.trials holds {entry!r}: a trial is a dict of key: value, {{'optim.learning_rate': 1e-4}}."
        )
    changes = dict(entry)
    name = changes.pop("name", "")
    if not isinstance(name, str) or (name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=,+-]*", name)):
        raise InputError(
            f"a trial is named {name!r}: a name is a folder's, of letters, digits and . _ = , + -, and begins with a "
            "letter or digit."
        )
    return name, changes


def _grid(grid: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination of a grid's values; keys joined by a comma go together."""
    axes = []
    for path, values in grid.items():
        if not isinstance(values, list | tuple) or not values:
            raise InputError(
                f"sweep.grid['{path}'] = {values!r}: it needs a list of at least one value, such as [1e-4, 2e-4]."
            )
        together = [key.strip() for key in path.split(",")]
        for value in values:
            if len(together) > 1 and (not isinstance(value, list | tuple) or len(value) != len(together)):
                raise InputError(
                    f"sweep.grid['{path}'] has {value!r}: keys that go together take a tuple of {len(together)} values."
                )
        for key in together:
            find_key(key)
        axes.append([dict(zip(together, v if len(together) > 1 else (v,), strict=True)) for v in values])
    for combination in itertools.product(*axes) if axes else ():
        yield {key: value for part in combination for key, value in part.items()}


def described(sweep: Sweep) -> dict[str, Any]:
    """The sweep as JSON values, whole, for its folder: what a repeated command is compared with."""
    halving = dataclasses.asdict(sweep.halving) if sweep.halving else None
    search = dataclasses.asdict(sweep.search) if sweep.search else None
    told = {"base": flat(sweep.base), "at_once": sweep.at_once, "halving": halving, "search": search}
    return json.loads(
        json.dumps(told | {"trials": {trial.name: dict(trial.changes) for trial in sweep.trials}})
    )


def described_defaults() -> dict[str, Any]:
    """What `described` says of a base that sets no key, as far as keys have a default."""
    told = {path: key.default for path, key in KEYS.items() if not key.required}
    return json.loads(json.dumps(told))
