"""Files that survive a kill at any moment: whole replacement, whole-line appends, a lock that dies with its holder."""

import fcntl
import json
import math
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from jaxlora.core.errors import InputError

LOCK, ASIDE = ".lock", ".partial"

_held_locks: set[int] = set()


def encode_json(value: Any, indent: int | None = None) -> bytes:
    """Valid JSON, ending in a newline, whatever numbers the value holds.

    JSON has no NaN and no infinity. A number that is not finite becomes null, with a key `<name>/nonfinite` beside it
    that says which: {"train/loss": null, "train/loss/nonfinite": "nan"} ("nan", "inf" or "-inf").

    Args:
        value: nested mappings and sequences of Python, numpy and JAX values, and paths.
        indent: spaces a level; None for one line.
    Raises:
        TypeError: a value has no JSON form.
    """
    return (json.dumps(_plain(value), indent=indent, ensure_ascii=False, allow_nan=False) + "\n").encode()


def encode_rows(columns: Mapping[str, Sequence[Any]]) -> bytes:
    """Columns of one length as JSON, one object a line.

    Raises:
        ValueError: columns of different lengths.
    """
    rows = zip(*columns.values(), strict=True)
    return b"".join(encode_json(dict(zip(columns, row, strict=True))) for row in rows)


def _plain(value: Any) -> Any:
    """JSON values of Python, numpy and JAX ones; non-finite numbers as `encode_json` says."""
    if isinstance(value, Mapping):
        plain: dict[str, Any] = {}
        for key, item in value.items():
            plain[str(key)] = item = _plain(item)
            if isinstance(item, float) and not math.isfinite(item):
                plain[str(key)] = None
                plain[f"{key}/nonfinite"] = str(item)
        return plain
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # numpy and JAX scalars and arrays
        return _plain(value.tolist())
    if isinstance(value, Iterable):
        # A list has no place for a key beside a value, so a non-finite number becomes its own name.
        items = [_plain(item) for item in value]
        return [str(item) if isinstance(item, float) and not math.isfinite(item) else item for item in items]
    raise TypeError(f"{value!r} of type {type(value).__name__} has no JSON form")


def replace(file: Path, content: bytes) -> None:
    """Puts `content` in place of the file at once: a reader or a crash sees the old content or the new, never less."""
    with replacing(file) as stream:
        stream.write(content)


@contextmanager
def replacing(file: Path) -> Iterator[BinaryIO]:
    """A stream whose content takes the file's place at once, when the block ends; not at all where it fails."""
    aside = file.with_name(file.name + ASIDE)
    try:
        with aside.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, file)
    except BaseException:
        aside.unlink(missing_ok=True)  # on a full disk the remains take the room that the next write needs
        raise


def append(file: Path, lines: bytes) -> None:
    """Appends whole lines; when the disk takes only a part of them, that part is cut off again."""
    with file.open("ab", buffering=0) as stream:
        end = stream.seek(0, os.SEEK_END)
        try:
            rest = memoryview(lines)
            while rest:
                rest = rest[stream.write(rest) :]
        except OSError:
            stream.truncate(end)
            raise


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder to fill, which becomes `folder` at once when the block ends, and goes away when it fails.

    What a killed process left aside is removed by the next one that makes the same folder.

    Args:
        folder: not there, or empty.
    Raises:
        InputError: another process is making it.
    """
    aside = folder.with_name(f".{folder.name}{ASIDE}")
    made = [parent for parent in folder.parents if not parent.exists()]
    aside.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(aside, "--out")
    try:
        for leftover in aside.iterdir():
            if leftover.is_dir():
                shutil.rmtree(leftover)
            elif leftover.name != LOCK:
                leftover.unlink()
        yield aside
        for file in aside.rglob("*"):
            if file.is_file():
                _sync(file)
        (aside / LOCK).unlink()
        os.rename(aside, folder)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        with suppress(OSError):  # somebody else put something there
            for parent in made:
                parent.rmdir()
        raise
    finally:
        release(lock)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_folder(folder: Path, option: str = "--workdir") -> int | None:
    """Locks the folder for this process; the system frees the lock when the process ends, however it ends.

    Args:
        folder: there already.
        option: with which the person can name another one.
    Returns:
        What `release` takes; None where the file system knows no locks.
    Raises:
        InputError: another process holds it.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        raise InputError(
            f"{folder} is in use by {holder}: wait for it to end, or give another {option}"
        ) from None
    except OSError:
        os.close(descriptor)
        return None  # a network file system without locks: working without one is better than not at all
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    _held_locks.add(descriptor)
    return descriptor


def release(lock: int | None) -> None:
    """Gives the lock back."""
    if lock is not None:
        _held_locks.discard(lock)
        os.close(lock)


def _let_go_in_child() -> None:
    """A forked worker inherits the descriptors; if it outlived its parent, it would keep the folder locked."""
    while _held_locks:
        os.close(_held_locks.pop())


os.register_at_fork(after_in_child=_let_go_in_child)
