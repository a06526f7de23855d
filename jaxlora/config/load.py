"""From what a person types to a checked `Config`: the config file, its parameter, and overrides.

A config file is Python with `get_config() -> ConfigDict`, or `get_config(parameter)` for `file.py:PARAMETER`. It starts
from `base_config()` and states what differs. The ConfigDict accepts anything; the schema alone decides what is
right, so that a mistake in the file and one on the command line are answered in the same words.
"""

import argparse
import ast
import contextlib
import difflib
import inspect
import re
import sys
import textwrap
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ml_collections import ConfigDict

from jaxlora.config.keys import Key
from jaxlora.config.schema import KEYS, SECTIONS, Config, defaults, find_key, nearest_key
from jaxlora.core.errors import InputError

_MODULE = "jaxlora_config_file"


def base_config() -> Any:
    """A ConfigDict with every key at its default, for a config file to start from.

    (Its annotation is Any: a type checker cannot know a ConfigDict's attributes.)

    `model.path` and `data.train` have no default: they are "" here, and a config that leaves them so is refused.
    """
    nested = defaults()
    for key in KEYS.values():
        if key.required:
            nested[key.path.rpartition(".")[0]][key.name] = ""
    return ConfigDict(nested, type_safe=False)


def load_config(argument: str, overrides: Sequence[str] = ()) -> Config:
    """Reads a config file, applies overrides, and checks the result.

    Args:
        argument: `path/to/config.py`, or `path/to/config.py:PARAMETER` for `get_config(PARAMETER)`.
        overrides: flags such as `--config.optim.learning_rate=1e-4`, applied in order.
    Returns:
        The checked config.
    Raises:
        InputError: the file is missing, fails or returns no config, it does not take the parameter or does not know
            it, or a key is unknown, of the wrong type or impossible.
    """
    return changed_config(read_config(argument), overrides)


def changed_config(plain: dict[str, Any], overrides: Sequence[str]) -> Config:
    """Applies overrides to nested plain dicts, and checks the result; errors as of `load_config`."""
    for flag in overrides:
        override(plain, flag)
    return Config.from_dict(plain)


def read_config(argument: str) -> dict[str, Any]:
    """What a config file's `get_config` returns, as nested plain dicts; not checked yet. Arguments as `load_config`."""
    return _call_get_config(*_split(argument))


def config_name(argument: str) -> str:
    """What a run of this config is called: the file's stem, and the parameter after a dash where there is one.

    `configs/qwen05b.py` is `qwen05b`, `configs/notebook.py:Nov22_10-57` is `notebook-Nov22_10-57`.
    """
    path, parameter = _split(argument)
    words = [path.stem] if parameter is None else [path.stem, parameter]
    return re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(words))


def _split(argument: str) -> tuple[Path, str | None]:
    match = re.fullmatch(r"(.+\.py)(?::(.*))?", argument)
    if match is None:
        raise InputError(
            f"--config {argument}: a config is a Python file.\n"
            "Give its path, for example configs/qwen05b.py, or FILE.py:PARAMETER where the file takes a parameter."
        )
    return Path(match[1]), match[2]


def _call_get_config(path: Path, parameter: str | None) -> dict[str, Any]:
    """Runs the file and returns what its `get_config` does, as nested plain dicts."""
    try:
        source = path.read_bytes()
    except OSError as error:
        raise InputError(_unreadable(path, error)) from None
    module = types.ModuleType(_MODULE)
    module.__file__ = str(path)
    outer = sys.modules.get(_MODULE)  # a config file may read another one
    sys.modules[_MODULE] = module  # dataclasses and pickling look a class's module up by name
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise InputError(
                f"{path} has no function get_config.\n"
                "A config file defines get_config() and returns a ConfigDict; configs/qwen05b.py is an example."
            )
        config = get_config(*_arguments(path, get_config, parameter))
    except InputError:
        raise
    except Exception as error:
        raise InputError(_failure(path, error)) from error
    finally:
        sys.modules.pop(_MODULE, None)
        if outer is not None:
            sys.modules[_MODULE] = outer
    if isinstance(config, ConfigDict):
        return dict(config.to_dict())
    if isinstance(config, Mapping):
        return {name: dict(child) if isinstance(child, Mapping) else child for name, child in config.items()}
    raise InputError(
        f"get_config in {path} returned {type(config).__name__}, not a ConfigDict.\n"
        "Start with config = base_config() from jaxlora.config.load, and return config."
    )


def _unreadable(path: Path, error: OSError) -> str:
    if path.exists():
        return f"cannot read the config {path}: {error.strerror}."
    there = sorted(other.name for other in path.parent.glob("*.py") if not other.name.startswith("_"))
    near = difflib.get_close_matches(path.name, there, n=1)
    if near:
        return f"there is no config {path}.\nDid you mean {path.parent / near[0]}?"
    return f"there is no config {path}.\n" + (
        f"In {path.parent} there are {', '.join(there)}."
        if there
        else f"There are no configs in {path.parent}; relative paths start at {Path.cwd()}."
    )


def _failure(path: Path, error: Exception) -> str:
    """One line on an exception that a config file raised: where in the file, and what."""
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)
    ]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines.append(error.lineno)
        message = error.msg
    else:
        message = str(error.args[0]) if error.args else ""
        if message[:1] in "'\"" and message[-1:] == message[:1]:  # ConfigDict hands on the repr of a message
            with contextlib.suppress(ValueError, SyntaxError):
                message = ast.literal_eval(message)
    where = f", line {lines[-1]}" if lines else ""
    said = textwrap.shorten(message, 300, placeholder=" ...") or "no message"
    return f"the config {path}{where} failed: {type(error).__name__}: {said}"


def _arguments(path: Path, get_config: Any, parameter: str | None) -> tuple[str, ...]:
    wanted = inspect.signature(get_config).parameters.values()
    if parameter is not None:
        if not wanted:
            raise InputError(
                f"{path} takes no parameter, so :{parameter} means nothing.\nUse --config {path}."
            )
        return (parameter,)
    if any(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in wanted):
        raise InputError(
            f"{path} needs a parameter: --config {path}:PARAMETER.\nIts comments say which there are."
        )
    return ()


def override(plain: dict[str, Any], flag: str) -> None:
    """Sets what a flag `--config.KEY=VALUE` says in nested dicts; errors as of `load_config`."""
    match = re.fullmatch(r"--config\.([^=]+)=(.*)", flag, re.DOTALL)
    if match is None:
        raise InputError(
            f"{flag} is no override.\nWrite --config.KEY=VALUE, for example --config.lora.rank=8."
        )
    path, text = match[1], match[2]
    if path in SECTIONS:
        raise InputError(
            f"{flag}: {path} is a group of keys.\n"
            f"Set one of {', '.join(key for key in KEYS if key.startswith(f'{path}.'))}."
        )
    key = find_key(path)
    section = plain.setdefault(path.rpartition(".")[0], {}) if "." in path else plain
    if not isinstance(section, dict):  # the file put a value in the section's place; the schema says so
        return
    section[key.name] = key.check(key.parse(text))


class CommandParser(argparse.ArgumentParser):
    """An argument parser that answers a mistake with `InputError`: one line, the nearest option, exit code 2."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--?[^ =]+)", message)
        if unknown:
            message = f"there is no option {unknown[1]}{self._nearest(unknown[1])}"
        raise InputError(f"{message} ({self.prog} --help lists all options)")

    def _nearest(self, option: str) -> str:
        bare = option.lstrip("-")
        if "." in bare and (key := nearest_key(bare)):
            return f": did you mean --config.{key}?"
        near = difflib.get_close_matches(option, self._option_string_actions, n=1)
        return f": did you mean {near[0]}?" if near else ""


def add_config_argument(
    parser: argparse.ArgumentParser, required: bool = True, keys: Mapping[str, Key] = KEYS
) -> None:
    """Gives a command `--config FILE[:PARAMETER]`, and lists every config key under its `--help`."""
    parser.add_argument(
        "--config",
        metavar="FILE.py[:PARAMETER]",
        required=required,
        help="the config; any key of it is set with --config.KEY=VALUE",
    )
    parser.epilog = "\n\n".join(filter(None, (parser.epilog, keys_help(keys))))


def parse_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str], find: Callable[[str], Key] = find_key
) -> tuple[argparse.Namespace, tuple[str, ...]]:
    """Parses a command line that may hold `--config.KEY=VALUE`, `--config.KEY VALUE` or a bare `--config.SWITCH`.

    Args:
        parser: the command's parser, with what `add_config_argument` adds.
        argv: the arguments, without the program's name.
        find: the key of a dotted name; raises an `InputError` for one that does not exist.
    Returns:
        The namespace, and the overrides for `load_config`, each as `--config.KEY=VALUE`.
    Raises:
        InputError: an unknown option or key, or an override without a value (from a `CommandParser`).
    """
    rest: list[str] = []
    overrides: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--config."):
            rest.append(word)
            continue
        if "=" not in word:
            path = word.removeprefix("--config.")
            key = find(path)
            bare = not words or words[0].startswith("--")
            if bare and key.kind is not bool:
                raise InputError(f"{word} has no value: it must be {key.allowed.words}.\n{key.remedy}")
            word = f"{word}={'true' if bare else words.pop(0)}"
        overrides.append(word)
    return parser.parse_args(rest), tuple(overrides)


def keys_help(keys: Mapping[str, Key] = KEYS) -> str:
    """Every public key with its default and its meaning, one paragraph a section."""
    lines = ["config keys, set in the config file or as --config.KEY=VALUE:"]
    section = None
    for key in keys.values():
        if (name := key.path.rpartition(".")[0]) != section:
            section = name
            lines.append("")
        default = "" if key.required else f"= {key.default!r}"
        lines.append(f"  {key.path + ' ' + default:<36}  {key.meaning}")
        if len(key.path) + len(default) > 35:
            lines[-1] = f"  {key.path} {default}\n{'':<40}{key.meaning}"
    return "\n".join(lines)
