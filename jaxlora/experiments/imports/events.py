"""TensorBoard's event files: the scalars and texts in them, read without TensorFlow."""

import itertools
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

PATTERN = "events.out.tfevents.*"
_HEADER, _CHECK = struct.Struct("<Q"), struct.Struct("<I")


@dataclass
class Events:
    """What the event files of one run hold.

    Attributes:
        scalars: tag -> {step: value}; of a step that was written twice the later value counts.
        texts: tag -> the newest text.
        began, ended: seconds since 1970 of the first and the last event; None without events.
        problems: files that end in the middle of a record, or cannot be read.
    """

    scalars: dict[str, dict[int, float]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    began: float | None = None
    ended: float | None = None
    problems: list[str] = field(default_factory=list)


def event_files(folder: Path) -> list[Path]:
    """The event files directly in a folder, in the order in which they were begun."""
    return sorted(folder.glob(PATTERN), key=lambda file: file.name)


def read_events(files: Sequence[Path]) -> Events:
    """Reads event files in their order; never raises for a broken one, `problems` says.

    Where a session begins after another one, the steps from its mark on are forgotten: a resumed run repeats them. The
    files of one session may begin in the same second, and its mark stand in any of them.
    """
    found = Events()
    for _, session in itertools.groupby(files, _second):
        events = [event for file in session for event in _events(file, found.problems)]
        for event in events:
            if event.session_log.status == event.session_log.START and event.step > 0:
                _forget_from(found, event.step)
        for event in events:
            if event.wall_time:
                found.began = event.wall_time if found.began is None else min(found.began, event.wall_time)
                found.ended = max(found.ended or 0.0, event.wall_time)
            for value in event.summary.value:
                _take(found, value, event.step)
    return found


def _second(file: Path) -> str:
    """The second in which a file was begun, of its name."""
    return file.name.split(".")[3]


def _events(file: Path, problems: list[str]) -> list[Any]:
    """The events of a file, as far as it is whole."""
    from tensorboard.compat.proto import event_pb2

    protos: Any = event_pb2  # made at run time, so that type checkers see nothing in it
    events = []
    try:
        for record in _records(file):
            events.append(protos.Event.FromString(record))
    except _BrokenError as broken:
        problems.append(f"{file.name}: {broken}; what comes before is read")
    except OSError as error:
        problems.append(f"{file.name} cannot be read ({error.strerror or error})")
    except DecodeError as error:
        problems.append(f"{file.name}: a record is no event ({error}); what comes before is read")
    return events


class _BrokenError(Exception):
    """An event file that ends too early, or holds something else."""


def _records(file: Path) -> Iterator[bytes]:
    """The records of a TFRecord file: length, its checksum, that many bytes, their checksum.

    Source: https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details
    """
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    content = file.read_bytes()
    at = 0
    while at < len(content):
        head = content[at : at + _HEADER.size]
        body = at + _HEADER.size + _CHECK.size
        if body > len(content):
            raise _BrokenError("the last record is cut")
        # Of the content only the length is checked: a checksum in Python takes longer than all the rest.
        if masked_crc32c(head) != _CHECK.unpack_from(content, at + _HEADER.size)[0]:
            raise _BrokenError(f"byte {at:,} begins no record")
        (length,) = _HEADER.unpack(head)
        if body + length + _CHECK.size > len(content):
            raise _BrokenError("the last record is cut")
        yield content[body : body + length]
        at = body + length + _CHECK.size


def _take(found: Events, value: Any, step: int) -> None:
    """Adds a value: torch's writer has `simple_value`, TensorFlow's a tensor; texts are tensors of strings."""
    from tensorboard.util.tensor_util import make_ndarray

    kind = value.WhichOneof("value")
    if kind == "simple_value":
        found.scalars.setdefault(value.tag, {})[step] = float(value.simple_value)
    elif kind == "tensor":
        try:
            array = np.asarray(make_ndarray(value.tensor))
        except (TypeError, ValueError):
            return  # a type that no curve has
        if array.dtype.kind in "OSU" and array.size:
            first = array.reshape(-1)[0]
            text = first.decode(errors="replace") if isinstance(first, bytes) else str(first)
            found.texts[value.tag.removesuffix("/text_summary")] = text
        elif array.dtype.kind in "fiu" and array.size == 1:
            found.scalars.setdefault(value.tag, {})[step] = float(array.reshape(-1)[0])


def _forget_from(found: Events, step: int) -> None:
    for tag, points in found.scalars.items():
        found.scalars[tag] = {at: value for at, value in points.items() if at < step}
