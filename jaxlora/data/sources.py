"""From a data set's name to conversations: hub ids and local jsonl, json, csv and parquet files."""

import codecs
import csv
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlora.core.errors import InputError, LayoutError
from jaxlora.data.rows import KINDS, OPTIONAL_COLUMNS, Conversation, read_row, recognise

if TYPE_CHECKING:  # pandas and pyarrow come with it: 88 MB, for those who read data
    from datasets import Dataset

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
JSON_ROW = " the row as JSON"
"""Column of a file that is kept as text: begins with a space, as no column of a person's file does."""

_TOOLS = re.compile(
    rb'"(?:tools|tool_calls)"'
)  # in JSON text, quotation marks inside a string have a backslash


@dataclass(frozen=True)
class Part:
    """One file or hub data set: its rows, and how they are read.

    Attributes:
        name: as the person gave it.
        rows: a column for each column of the file; or one, `JSON_ROW`, with every row as its JSON text.
        columns: of the file.
        kind: a key of `KINDS`.
    """

    name: str
    rows: "Dataset"
    columns: tuple[str, ...]
    kind: str

    def describe(self) -> str:
        used = (*KINDS[self.kind], *OPTIONAL_COLUMNS.get(self.kind, ()))
        unused = [column for column in self.columns if column not in used]
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
        """The key of `KINDS` by which all rows are read; several, joined by "+", where the parts differ."""
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
            texts = columns.get(JSON_ROW)
            for position, row in enumerate(rows):
                if texts is None:
                    values = {column: cells[position] for column, cells in columns.items()}
                else:
                    values = {**dict.fromkeys(part.columns), **json.loads(texts[position])}
                try:
                    found.append(read_row(part.kind, values, exact=texts is not None))
                except InputError as error:
                    raise InputError(f"{part.name}, row {row + 1}: {error}") from None
        return found

    def where(self, i: int) -> str:
        """Where conversation i stands, in a person's words: "data/train.jsonl, row 7" (rows count from 1)."""
        name, row = self.place(i)
        return f"{name}, row {row}"

    def place(self, i: int) -> tuple[str, int]:
        """The file or data set that conversation i stands in, and its row there, from 1."""
        ((part, rows),) = self._by_part(i, i + 1)
        return part.name, rows[0] + 1

    def select(self, indices: Sequence[int] | np.ndarray) -> "Source":
        """The source of these conversations only, in this order."""
        chosen = np.asarray(indices, np.int64)
        digest = hashlib.sha256(self.fingerprint.encode() + chosen.tobytes()).hexdigest()[:32]
        return replace(self, index=self.index[chosen], fingerprint=digest)

    def part_of(self, rows: np.ndarray) -> np.ndarray:
        """For each of these conversations, which of `parts` it comes from."""
        ends = np.cumsum([len(part.rows) for part in self.parts])
        return np.searchsorted(ends, self.index[rows], side="right")

    @property
    def part_names(self) -> list[str]:
        """A short name for each part, all different: a file's stem ("data/stories.jsonl": "stories"), a hub id without
        its owner; where two are the same, with the folder or owner before it, and a number at last.
        """
        stems = [re.sub(rf"({'|'.join(READERS)})$", "", part.name.replace(":", "-")) for part in self.parts]
        words = [re.findall(r"[\w.-]*\w[\w.-]*", stem) or ["source"] for stem in stems]
        names = [word[-1] for word in words]
        for i, word in enumerate(words):
            if sum(word[-1] == other[-1] for other in words) > 1:
                names[i] = "-".join(word[-2:])
        for i, name in enumerate(names):
            names[i] = name if name not in names[:i] else f"{name}-{i + 1}"
        return names

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
        raise InputError(
            "no data is named; set data.train to a hub id or to a jsonl, json, csv or parquet file"
        )
    parts, digests = [], []
    for done, name in enumerate(names):
        rows, columns, digest = (
            _load_file(Path(name).expanduser(), name, split) if _is_file(name) else _load_hub(name, split)
        )
        if len(rows) == 0:
            raise InputError(f"{name} holds no rows; expected at least one conversation")
        parts.append(Part(name, rows, columns, recognise(columns, name)))
        digests.append(digest)
        if progress is not None:
            progress(done + 1, len(names))
    fingerprint = hashlib.sha256("\n".join([*digests, *(part.kind for part in parts)]).encode()).hexdigest()[
        :32
    ]
    return Source(tuple(parts), np.arange(sum(len(part.rows) for part in parts)), fingerprint)


def split_off_eval(source: Source, fraction: float, seed: int) -> tuple[Source, Source]:
    """Splits a source into (train, eval): round(fraction * n) rows, at least one, drawn by the seed.

    Both keep the order of the source; the same source, fraction and seed always give the same rows.

    Raises:
        InputError: a fraction outside (0, 1).
        LayoutError: nothing would be left to train on.
    """
    if not 0 < fraction < 1:
        raise InputError(
            f"data.eval_fraction is {fraction}; it must lie between 0 and 1, or data.eval be given"
        )
    count = max(1, round(fraction * len(source)))
    if count >= len(source):
        raise LayoutError(
            f"data.eval_fraction {fraction} of {len(source)} rows leaves nothing to train on; "
            "give more rows, a smaller fraction, or data.eval"
        )
    chosen = np.zeros(len(source), bool)
    # The second word keeps this draw apart from every other use of the same seed.
    chosen[np.random.default_rng([seed, 0x5E7A51DE]).permutation(len(source))[:count]] = True
    return source.select(np.flatnonzero(~chosen)), source.select(np.flatnonzero(chosen))


# ---- files and the hub --------------------------------------------------------------------------------------------


def _is_file(name: str) -> bool:
    path = Path(name).expanduser()
    return path.suffix.lower() in READERS or path.exists() or name.startswith(("/", "./", "../", "~"))


def _load_file(path: Path, name: str, split: str) -> tuple["Dataset", tuple[str, ...], str]:
    """Reads a local file through datasets, as (rows, the file's columns, the hash of its bytes)."""
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
    digest, tools = _content_hash(path, name, text=reader != "parquet")
    options: dict[str, Any] = {}
    if reader == "csv":
        # Everything is text: pandas would read "007" as 7 and "NA" as nothing.
        header = _csv_header(path, name)
        options = {
            "features": Features({column: Value("string") for column in header}),
            "keep_default_na": False,
        }
    try:
        with _quiet_datasets():
            wanted = "train" + "".join(split.partition("[")[1:])
            if reader == "json" and tools:
                rows, columns = _load_json_rows(path, digest, wanted)
            else:
                rows = load_dataset(reader, data_files=[str(path.resolve())], split=wanted, **options)
                columns = tuple(rows.column_names)
    except Exception as error:
        raise InputError(f"{name} cannot be read: {_why_unreadable(path, reader, error)}") from error
    return rows, columns, digest + split.partition("[")[2]


def _load_json_rows(path: Path, digest: str, split: str) -> tuple["Dataset", tuple[str, ...]]:
    """The rows of a file with tools, each as JSON text, and the columns that any of them has.

    In a table, every schema and every call gets the keys of all others, in one order, and numbers are rounded on the
    way: what the template then writes would no longer be what the file says.
    """
    from datasets import Dataset, Features, ReadInstruction, Value

    columns = tuple(dict.fromkeys(key for row in _json_rows(path) for key in row))
    rows = Dataset.from_generator(
        _json_texts,
        features=Features({JSON_ROW: Value("large_string")}),
        gen_kwargs={"path": str(path.resolve()), "digest": digest},
    )
    parts = ReadInstruction.from_spec(split).to_absolute({"train": len(rows)})
    return rows.select([row for part in parts for row in range(part.from_, part.to)]), columns


def _json_texts(path: str, digest: str) -> Iterator[dict[str, str]]:
    """What datasets writes to the disk, once for a digest (which it sees among the arguments)."""
    for row in _json_rows(Path(path)):
        yield {JSON_ROW: json.dumps(row, ensure_ascii=False)}


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON list, or of lines of JSON; a ValueError where there is anything else."""
    with path.open(encoding="utf-8-sig") as file:
        beginning = file.read(1000).lstrip()[:1]
        file.seek(0)
        rows = json.load(file) if beginning == "[" else (json.loads(line) for line in file if line.strip())
        for row in rows:
            if not isinstance(row, dict):
                raise ValueError("it holds something other than JSON objects")
            yield row


def _content_hash(path: Path, name: str, *, text: bool) -> tuple[str, bool]:
    """Hash of the file's bytes, and whether a JSON key in it speaks of tools.

    Readers pass over bytes that are no UTF-8, so in a text they are looked for here.
    """
    digest, decoder, line = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")(), 1
    tools, end = False, b""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            tools = tools or _TOOLS.search(end + block) is not None
            end = block[-20:]
            if text:
                try:
                    decoder.decode(block)
                except UnicodeDecodeError as problem:
                    line += block[: problem.start].count(b"\n")
                    raise InputError(f"{name} cannot be read: line {line} is not UTF-8 text") from None
                line += block.count(b"\n")
    return digest.hexdigest(), tools


def _csv_header(path: Path, name: str) -> list[str]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        header = next(csv.reader(file), [])
    if len(set(header)) != len(header) or not header:
        raise InputError(f"{name} must begin with a line of different column names; it begins with {header}")
    return header


def _why_unreadable(path: Path, reader: str, error: Exception) -> str:
    """The reason with its line number: readers of whole blocks say only where in the block they failed."""
    if reader == "json":
        text = path.read_text(encoding="utf-8-sig")
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
    if "corresponds to no data" in str(cause):
        return "it holds no rows; expected at least one conversation"
    found = re.search(r"in line (\d+)", str(cause))
    where = f"line {found[1]}: " if found else ""
    return where + (str(cause).strip() or type(cause).__name__).splitlines()[0]


def _load_hub(name: str, split: str) -> tuple["Dataset", tuple[str, ...], str]:
    """Loads from the hub, or from its cache, as (rows, columns, what datasets derives from the set's revision)."""
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
            reason = (
                f"it has several configurations; add one, as {identifier}:{configs[0] if configs else 'NAME'}"
            )
        raise InputError(f"{name} cannot be loaded: {reason}") from error
    except (ConnectionError, OSError) as error:
        raise InputError(f"{name} is not in the cache and the hub cannot be reached; "
                         "connect to the network once, or give a local file") from error  # fmt: skip
    return rows, tuple(rows.column_names), f"{rows._fingerprint} {len(rows)}"


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Keeps the libraries' own bars and log lines off the terminal: what goes wrong is said by our error."""
    import datasets

    bars, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    hub = logging.getLogger("huggingface_hub")
    hub_level = hub.level
    hub.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        hub.setLevel(hub_level)
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()
