"""From a data set's name to conversations: hub ids and local jsonl, json, csv and parquet files."""

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlora.core.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

Message = dict[str, str]
Conversation = list[Message] | str
"""Messages {"role", "content"} in order, or the plain text of a row that is no conversation."""

ROLES = ("system", "user", "assistant")
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}

# The first kind whose columns are all there is the one used: a set that carries both conversations and a flattened
# copy of them (as several on the hub do) is read as conversations.
KINDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
OPTIONAL_COLUMNS = {"alpaca": ("input", "system"), "sharegpt": ("system",)}
SPEAKERS = {"human": "user", "gpt": "assistant"}
# Fields of a message that carry text which the conversation would lose if they were passed over.
UNSUPPORTED_FIELDS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Part:
    """One file or hub data set: its rows, and how they are read."""

    name: str
    rows: "Dataset"
    kind: str

    def describe(self) -> str:
        used = (*KINDS[self.kind], *OPTIONAL_COLUMNS.get(self.kind, ()))
        unused = [column for column in self.rows.column_names if column not in used]
        note = f" (not used: {', '.join(unused)})" if unused else ""
        return f"{self.name}: {len(self.rows):,} rows of {self.kind}{note}"


@dataclass(frozen=True)
class Source:
    """Conversations in a fixed order, read from the disk when they are asked for.

    Attributes:
        parts: the files and data sets this was loaded from.
        index: [n] positions in the concatenation of the parts; the conversations of this source.
        fingerprint: stable hash of the content and of which rows of it are used.
    """

    parts: tuple[Part, ...]
    index: np.ndarray
    fingerprint: str

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Conversation:
        return self.conversations(i, i + 1)[0]

    @property
    def kind(self) -> str:
        """The kinds of the parts: "messages", "prompt_completion", "alpaca", "sharegpt" or "text"; joined by "+" when parts differ."""
        return "+".join(dict.fromkeys(part.kind for part in self.parts))

    @property
    def description(self) -> str:
        """What was recognised, in one line: "data/train.jsonl: 7,473 rows of messages"."""
        line = "; ".join(part.describe() for part in self.parts)
        everything = sum(len(part.rows) for part in self.parts)
        return line if len(self) == everything else f"{line}; {len(self):,} of {everything:,} used here"

    def conversations(self, start: int, stop: int) -> list[Conversation]:
        """Conversations start .. stop - 1, in order.

        Raises:
            InputError: a row that is no conversation, named by file and row number.
        """
        found: list[Conversation] = []
        for part, rows in self._by_part(start, stop):
            columns = part.rows[rows]
            for position, row in enumerate(rows):
                values = {column: cells[position] for column, cells in columns.items()}
                try:
                    found.append(read_row(part.kind, values))
                except InputError as error:
                    raise InputError(f"{part.name}, row {row + 1}: {error}") from None
        return found

    def where(self, i: int) -> str:
        """Where conversation i stands, in a person's words: "data/train.jsonl, row 7" (rows count from 1)."""
        ((part, rows),) = self._by_part(i, i + 1)
        return f"{part.name}, row {rows[0] + 1}"

    def select(self, indices: Sequence[int] | np.ndarray) -> "Source":
        """The source of these conversations only, in this order."""
        chosen = np.asarray(indices, np.int64)
        digest = hashlib.sha256(self.fingerprint.encode() + chosen.tobytes()).hexdigest()[:32]
        return replace(self, index=self.index[chosen], fingerprint=digest)

    def _by_part(self, start: int, stop: int) -> Iterator[tuple[Part, list[int]]]:
        """Runs of neighbouring conversations that come from the same part, as (part, its row numbers from 0)."""
        if not 0 <= start < stop <= len(self):
            raise IndexError(f"conversations {start}..{stop} of {len(self)}")
        ends = np.cumsum([len(part.rows) for part in self.parts])
        index = self.index[start:stop]
        owner = np.searchsorted(ends, index, side="right")
        for run in np.split(np.arange(len(index)), np.flatnonzero(np.diff(owner)) + 1):
            part = int(owner[run[0]])
            yield self.parts[part], (index[run] - (ends[part] - len(self.parts[part].rows))).tolist()


def load_conversations(
    paths: str | tuple[str, ...],
    split: str = "train",
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Source:
    """Loads one data set, or several one after the other, as conversations.

    Args:
        paths: hub id ("owner/name", or "owner/name:config" for one of its configurations) or path of a jsonl, json,
            csv or parquet file; a tuple mixes several.
        split: the hub's name of the split; "" means "train". A file has one split, so only a slice
            ("train[:1000]") matters there.
        progress: called with (data sets loaded, data sets in all).
    Returns:
        The source, with rows in the order of the files.
    Raises:
        InputError: a missing, empty or malformed file, an unknown id, split or set of columns.
    """
    names = (paths,) if isinstance(paths, str) else tuple(paths)
    if not names or not all(names):
        raise InputError("no training data is named; set data.train to a hub id or to a jsonl, json, csv or parquet file")
    parts, digests = [], []
    for done, name in enumerate(names):
        rows, digest = _load_file(Path(name).expanduser(), name, split) if _is_file(name) else _load_hub(name, split)
        if len(rows) == 0:
            raise InputError(f"{name} holds no rows; expected at least one conversation")
        parts.append(Part(name, rows, recognise(rows.column_names, name)))
        digests.append(digest)
        if progress is not None:
            progress(done + 1, len(names))
    fingerprint = hashlib.sha256("\n".join([*digests, *(part.kind for part in parts)]).encode()).hexdigest()[:32]
    return Source(tuple(parts), np.arange(sum(len(part.rows) for part in parts)), fingerprint)


def split_off_eval(source: Source, fraction: float, seed: int) -> tuple[Source, Source]:
    """Splits a source into (train, eval): round(fraction * n) rows, at least one, drawn by the seed.

    Both keep the order of the source; the same source, fraction and seed always give the same rows.

    Raises:
        InputError: a fraction outside (0, 1), or nothing left to train on.
    """
    if not 0 < fraction < 1:
        raise InputError(f"data.eval_fraction is {fraction}; it must lie between 0 and 1, or data.eval be given")
    count = max(1, round(fraction * len(source)))
    if count >= len(source):
        raise InputError(
            f"data.eval_fraction {fraction} of {len(source)} rows leaves nothing to train on; "
            "give more rows, a smaller fraction, or data.eval"
        )
    chosen = np.zeros(len(source), bool)
    # The second word keeps this draw apart from every other use of the same seed.
    chosen[np.random.default_rng([seed, 0x5E7A51DE]).permutation(len(source))[:count]] = True
    return source.select(np.flatnonzero(~chosen)), source.select(np.flatnonzero(chosen))


def recognise(columns: Sequence[str], name: str) -> str:
    """The kind of rows that have these columns.

    Raises:
        InputError: no kind has them; found and accepted columns are named.
    """
    for kind, needed in KINDS.items():
        if all(column in columns for column in needed):
            return kind
    accepted = "; ".join("instruction, output (and input)" if kind == "alpaca" else ", ".join(needed)
                         for kind, needed in KINDS.items())  # fmt: skip
    raise InputError(f"{name} has the columns {', '.join(columns)}, which are not recognised. Accepted are: {accepted}")


# ---- one row ----------------------------------------------------------------------------------------------------


def read_row(kind: str, row: Mapping[str, Any]) -> Conversation:
    """Reads one row of the given kind.

    Args:
        kind: a key of `KINDS`.
        row: column -> value.
    Returns:
        Messages, or the text of a row of text.
    Raises:
        InputError: not text where text must be, an unknown role, or turns in an order no template can show.
    """
    if kind == "text":
        return _text(row["text"], "text")
    if kind == "alpaca":
        question = _text(row["instruction"], "instruction")
        if row.get("input"):
            question += "\n\n" + _text(row["input"], "input")
        messages = _system(row) + [_message("user", question), _message("assistant", _text(row["output"], "output"))]
    elif kind == "prompt_completion":
        messages = _turns(row["prompt"], "user", "prompt") + _turns(row["completion"], "assistant", "completion")
    else:
        messages = _system(row) if kind == "sharegpt" else []
        messages += _messages(row[KINDS[kind][0]], KINDS[kind][0])
    check_order(messages)
    return messages


def check_order(messages: Sequence[Message]) -> None:
    """Raises InputError unless the user speaks first and user and assistant take turns."""
    if not messages:
        raise InputError("the conversation is empty")
    speakers = [message["role"] for message in messages if message["role"] != "system"]
    for turn, role in enumerate(speakers):
        expected = ("user", "assistant")[turn % 2]
        if role != expected:
            problem = "the conversation starts with the assistant" if turn == 0 else f"two {role} turns in a row"
            raise InputError(f"{problem}; user and assistant must take turns, the user first")


def _system(row: Mapping[str, Any]) -> list[Message]:
    return [_message("system", _text(row["system"], "system"))] if row.get("system") else []


def _turns(value: Any, role: str, column: str) -> list[Message]:
    """A prompt or completion: plain text, or messages."""
    return [_message(role, value)] if isinstance(value, str) else _messages(value, column)


def _messages(value: Any, column: str) -> list[Message]:
    if isinstance(value, str):  # csv has no lists; there a conversation is written as JSON
        try:
            value = json.loads(value)
        except ValueError:
            pass
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(m, Mapping) for m in value):
        raise InputError(f"{column} is {_shown(value)}; expected a list of messages with role and content")
    return [_read_message(message, number) for number, message in enumerate(value, 1)]


def _read_message(message: Mapping[str, Any], number: int) -> Message:
    role = message.get("role") or message.get("from")
    if role not in ROLES and role not in SPEAKERS:
        raise InputError(f"message {number} has the unknown role {_shown(role)}; allowed: {', '.join(ROLES)} "
                         f"(or {', '.join(SPEAKERS)} in sharegpt)")  # fmt: skip
    for field in UNSUPPORTED_FIELDS:
        if message.get(field):
            raise InputError(f"message {number} carries {field}, which is not supported: its text would be lost")
    content = message.get("content") if message.get("content") is not None else message.get("value")
    return _message(SPEAKERS.get(role, role), _text(content, f"the content of message {number}"))


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{what} is {_shown(value)}; expected text")
    return value


def _shown(value: Any) -> str:
    if value is None:
        return "missing"
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return shown if len(shown) <= 60 else shown[:57] + "..."


# ---- files and the hub --------------------------------------------------------------------------------------------


def _is_file(name: str) -> bool:
    path = Path(name).expanduser()
    return path.suffix.lower() in READERS or path.exists() or name.startswith(("/", "./", "../", "~"))


def _load_file(path: Path, name: str, split: str) -> tuple["Dataset", str]:
    """Reads a local file through datasets; the fingerprint is the hash of its bytes."""
    from datasets import Features, Value, load_dataset

    reader = READERS.get(path.suffix.lower())
    if not path.exists():
        raise InputError(f"{name} does not exist; data.train and data.eval take a hub id or an existing file")
    if path.is_dir():
        raise InputError(f"{name} is a folder; name the {', '.join(READERS)} files in it")
    if reader is None:
        raise InputError(f"{name} ends in {path.suffix or 'nothing'}; files are read as {', '.join(READERS)}")
    if path.stat().st_size == 0:
        raise InputError(f"{name} is empty; expected at least one conversation")
    options: dict[str, Any] = {}
    if reader == "csv":
        # Everything is text: pandas would read "007" as 7 and "NA" as nothing.
        header = _csv_header(path, name)
        options = {"features": Features({column: Value("string") for column in header}), "keep_default_na": False}
    digest = hashlib.sha256(split.partition("[")[2].encode())
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    try:
        with _quiet_datasets():
            rows = load_dataset(
                reader, data_files=[str(path.resolve())], split="train" + "".join(split.partition("[")[1:]), **options
            )
    except Exception as error:
        raise InputError(f"{name} cannot be read: {_why_unreadable(path, reader, error)}") from error
    return rows, digest.hexdigest()


def _csv_header(path: Path, name: str) -> list[str]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header = next(csv.reader(file), [])
    except UnicodeDecodeError:
        raise InputError(f"{name} is not UTF-8 text; save it as UTF-8") from None
    if len(set(header)) != len(header) or not header:
        raise InputError(f"{name} must begin with a line of different column names; it begins with {header}")
    return header


def _why_unreadable(path: Path, reader: str, error: Exception) -> str:
    """The reason with its line number: readers of whole blocks say only where in the block they failed."""
    if reader == "json":
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as problem:
            line = path.read_bytes()[: problem.start].count(b"\n") + 1
            return f"line {line} is not UTF-8 text"
        if not text.strip():
            return "it is empty; expected at least one conversation"
        if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
            try:
                json.loads(text)
            except json.JSONDecodeError as problem:
                return f"line {problem.lineno} is not valid JSON ({problem.msg})"
        else:
            for number, line in enumerate(text.split("\n"), 1):
                try:
                    if line.strip() and not isinstance(json.loads(line), dict):
                        return f"line {number} is not a JSON object"
                except json.JSONDecodeError as problem:
                    return f"line {number} is not valid JSON ({problem.msg})"
    cause = error.__cause__ or error
    found = re.search(r"in line (\d+)", str(cause))
    where = f"line {found[1]}: " if found else ""
    return where + (str(cause).strip() or type(cause).__name__).splitlines()[0]


def _load_hub(name: str, split: str) -> tuple["Dataset", str]:
    """Loads from the hub, or from its cache; the fingerprint is the one datasets derives from the set's revision."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    identifier, _, config = name.partition(":")
    try:
        with _quiet_datasets():
            rows = load_dataset(identifier, config or None, split=split or "train")
    except DatasetNotFoundError:
        raise InputError(f"{name} is neither a file here nor a data set on the hub that you may read; "
                         "check the spelling, or log in with `hf auth login`") from None  # fmt: skip
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        if "Config name is missing" in str(error):
            configs = re.findall(r"'([^']+)'", str(error))
            reason = f"it has several configurations; add one, as {identifier}:{configs[0] if configs else 'NAME'}"
        raise InputError(f"{name} cannot be loaded: {reason}") from error
    except (ConnectionError, OSError) as error:
        raise InputError(f"{name} is not in the cache and the hub cannot be reached; "
                         "connect to the network once, or give a local file") from error  # fmt: skip
    return rows, f"{rows._fingerprint} {len(rows)}"


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Keeps datasets' own bars and log lines off the terminal: what goes wrong is said by our error."""
    import datasets

    bars, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(50)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()
