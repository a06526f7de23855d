"""Encoded examples in flat arrays, and batches of them as a pure function of (seed, step)."""

import copy
import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from jaxlora.core.allocator import rare_collections
from jaxlora.core.errors import InputError, LayoutError
from jaxlora.data.chat import ChatEncoder, Encoded
from jaxlora.data.packing import efficiency, pack
from jaxlora.data.sources import Source
from jaxlora.data.template import ConversationError

Batch = dict[str, np.ndarray]
"""[B, T] arrays: tokens, targets, segments, positions int32; weights float32."""

FORMAT = 2
"""Version of the encoding and of its cache: raised whenever the same input would give other arrays."""

CHUNK = 500
"""Conversations encoded together: enough to fill every core, and a progress report every tenth of a second."""


@dataclass(frozen=True)
class Examples:
    """Encoded examples, one after the other.

    Example e is ids[offsets[e] : offsets[e + 1]]; it ends with its last trained id, since nothing after that is
    predicted.

    Attributes:
        ids: int32 [tokens].
        trained: bool [tokens].
        offsets: int64 [examples + 1].
        source_rows: int64 [examples], the conversation of the source that each came from.
        conversations: how many the source has.
        truncated: examples that lost trained tokens at `max_length`.
        dropped: conversations that lost all their trained tokens there, and are not among the examples.
        max_length: positions that an example may take.
        name: the data set, for messages to a person.
    """

    ids: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    source_rows: np.ndarray
    conversations: int
    truncated: int
    dropped: int
    max_length: int
    name: str

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, e: int | np.integer) -> Encoded:
        """The ids and the mask of example e."""
        if not 0 <= e < len(self):
            raise IndexError(f"example {e} of {len(self)}")
        span = slice(self.offsets[e], self.offsets[e + 1])
        return Encoded(self.ids[span], self.trained[span])

    @property
    def lengths(self) -> np.ndarray:
        """Positions each example takes in a row [examples]: its ids but the last, which is only predicted."""
        return np.diff(self.offsets) - 1

    @property
    def tokens(self) -> int:
        """All ids."""
        return len(self.ids)

    @property
    def trained_tokens(self) -> int:
        """All trained targets: the first id of an example is never one, since nothing predicts it."""
        return int(np.count_nonzero(self.trained) - np.count_nonzero(self.trained[self.offsets[:-1]]))

    def describe(self) -> list[str]:
        """The counts, in lines for a person."""
        share = self.trained_tokens / self.tokens
        lines = [
            f"{self.name}: {len(self):,} examples, {self.tokens:,} tokens, "
            f"{self.trained_tokens:,} of them trained ({share:.1%}), longest {self.lengths.max() + 1:,}"
        ]
        if self.truncated:
            lines.append(
                f"{self.truncated:,} of {self.conversations:,} conversations are cut at data.max_length "
                f"{self.max_length:,} and lose a part of what would be trained"
            )
        if self.dropped:
            lines.append(
                f"{self.dropped:,} of {self.conversations:,} conversations are dropped: "
                f"nothing trained is left within data.max_length {self.max_length:,}"
            )
        return lines

    def first(self, count: int) -> "Examples":
        """The first `count` examples (all where there are no more); the other counts stay."""
        return self.select(np.arange(min(count, len(self))))

    def select(self, chosen: np.ndarray) -> "Examples":
        """The examples of these numbers, in this order; the other counts stay."""
        lengths = np.diff(self.offsets)[chosen]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        kept = np.repeat(self.offsets[chosen] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return replace(
            self,
            ids=self.ids[kept],
            trained=self.trained[kept],
            offsets=offsets,
            source_rows=self.source_rows[chosen],
        )


# ---- preparing: source -> examples, through the cache -----------------------------------------------------------


def prepare(
    source: Source,
    encoder: ChatEncoder,
    max_length: int,
    *,
    cache: Path | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Examples:
    """Encodes a source, or reads it from the cache where the same was encoded before.

    Args:
        source: conversations or texts.
        encoder: template, tokenizer and what is trained.
        max_length: positions in a row. An example keeps its first max_length + 1 ids: each position predicts the
            next id, and the last id is only predicted.
        cache: folder of cached encodings; None is `jaxlora` in datasets' own cache.
        progress: called with (conversations encoded, conversations in all).
    Returns:
        The examples, in the order of the source.
    Raises:
        InputError: a row that cannot be read, rendered or trained on, named by file and row number.
        LayoutError: nothing is left of any row within max_length.
    """
    known = [FORMAT, source.fingerprint, encoder.fingerprint, max_length]
    path = _cache_folder(cache) / f"{hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]}.npz"
    arrays = _read_cache(path)
    if arrays is None:
        with rare_collections():
            arrays = _encode(source, encoder, max_length, progress)
        _write_cache(path, arrays)
    counts = [int(count) for count in arrays.pop("counts")]
    examples = Examples(**arrays, conversations=len(source), truncated=counts[0], dropped=counts[1],
                        max_length=max_length, name=", ".join(part.name for part in source.parts))  # fmt: skip
    if len(examples) == 0:
        raise LayoutError(f"every conversation of {examples.name} loses all its trained tokens at data.max_length "
                          f"{max_length:,}; raise it")  # fmt: skip
    return examples


def _encode(
    source: Source, encoder: ChatEncoder, max_length: int, progress: Callable[[int, int], None] | None
) -> dict[str, np.ndarray]:
    ids, trained, rows = [], [], []
    truncated = dropped = 0
    for start, encoded in encoded_chunks(source, encoder):
        for row, example in enumerate(encoded, start):
            full = _last_target(example.trained)
            last = full if full <= max_length else _last_target(example.trained[: max_length + 1])
            truncated += 0 < last < full
            dropped += last == 0
            if last:
                ids.append(example.ids[: last + 1])
                trained.append(example.trained[: last + 1])
                rows.append(row)
        if progress is not None:
            progress(start + len(encoded), len(source))
    lengths = np.array([len(example) for example in ids], np.int64)
    return {
        "ids": np.concatenate([np.zeros(0, np.int32), *ids]),
        "trained": np.concatenate([np.zeros(0, bool), *trained]),
        "offsets": np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        "source_rows": np.array(rows, np.int64),
        "counts": np.array([truncated, dropped], np.int64),
    }


def _last_target(trained: np.ndarray) -> int:
    """The place of the last trained id, 0 when none is trained (the first id itself is never a target)."""
    found = np.flatnonzero(trained)
    return int(found[-1]) if len(found) else 0


def encoded_chunks(source: Source, encoder: ChatEncoder) -> Iterator[tuple[int, list[Encoded]]]:
    """Yields (first conversation, encodings) of `CHUNK` whole conversations at a time, in order.

    The tokenizer's own threads use every core, but Python's part before and after them uses one: two chunks at a time
    fill that gap, unless there is no other part. Threads, not processes: forking a process that holds JAX's threads can
    hang.

    Raises:
        InputError: a row that cannot be read, rendered or trained on, named by file and row number.
    """

    def encode(start: int) -> list[Encoded]:
        try:
            return encoder.encode_batch(source.conversations(start, min(start + CHUNK, len(source))))
        except ConversationError as error:
            raise InputError(f"{source.where(start + error.index)}: {error.reason}") from None

    starts = iter(range(0, len(source), CHUNK))
    if encoder.looks_up(source.conversations(0, min(CHUNK, len(source)))):
        yield from ((start, encode(start)) for start in starts)
        return
    with ThreadPoolExecutor(2, thread_name_prefix="tokenise") as pool:
        waiting: list[tuple[int, Future[list[Encoded]]]] = []
        waiting += [(s, pool.submit(encode, s)) for s in islice(starts, 3)]
        try:
            while waiting:
                start, future = waiting.pop(0)
                yield start, future.result()
                waiting += [(s, pool.submit(encode, s)) for s in islice(starts, 1)]
        finally:
            for _, future in waiting:
                future.cancel()


def _cache_folder(cache: Path | str | None) -> Path:
    if cache is not None:
        return Path(cache)
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "jaxlora"


def _read_cache(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of an entry; None when there is none, or a broken one (a zip file checks its own sums)."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in ("ids", "trained", "offsets", "source_rows", "counts")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    sound = len(arrays["ids"]) == len(arrays["trained"]) == arrays["offsets"][-1]
    return arrays if sound else None


def _write_cache(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes an entry beside its place and renames it, so that no reader ever sees half of it.

    A cache that cannot be written (a full disk, a folder of someone else's) costs time at the next run, nothing else.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            try:
                np.savez(file, **arrays)  # type: ignore[arg-type]
                file.close()
                os.replace(file.name, path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError:
        pass


# ---- batches ----------------------------------------------------------------------------------------------------


class _Rows:
    """Examples laid out in rows of `max_length` positions."""

    def __init__(self, examples: Examples, batch_size: int, max_length: int, packing: bool):
        self.examples, self.batch_size, self.max_length = examples, batch_size, max_length
        self.rows = pack(examples.lengths, max_length, packing=packing)
        self.most_segments = max(map(len, self.rows), default=0)

    @property
    def efficiency(self) -> float:
        """The share of all positions in all rows that hold a token."""
        return efficiency(self.examples.lengths, len(self.rows), self.max_length)

    def _fill(self, rows: list[tuple[int, ...]], batch_size: int) -> Batch:
        """Arrays [batch_size, T] of these rows; what they do not fill is padding (segment 0, weight 0)."""
        shape = (batch_size, self.max_length)
        batch: Batch = {n: np.zeros(shape, np.int32) for n in ("tokens", "targets", "segments", "positions")}
        batch["weights"] = np.zeros(shape, np.float32)
        for b, row in enumerate(rows):
            at = 0
            for segment, e in enumerate(row, 1):
                ids, trained = self.examples[e]
                span = slice(at, at + len(ids) - 1)
                batch["tokens"][b, span] = ids[:-1]
                batch["targets"][b, span] = ids[1:]
                batch["weights"][b, span] = trained[1:]
                batch["segments"][b, span] = segment
                batch["positions"][b, span] = np.arange(len(ids) - 1)
                at = span.stop
        return batch


class Batches(_Rows):
    """Training batches: batch(step) depends on the examples, the seed and the step alone.

    Every epoch goes through all rows once, in an order drawn from (seed, epoch). The last batch of an epoch is filled
    up with empty rows.

    Args:
        examples: what to train on.
        batch_size: rows in a batch, B.
        max_length: positions in a row, T.
        seed: draws the order of the rows.
        shuffle: False keeps the order of the examples, in every epoch.
        packing: False gives every example a row of its own.
    """

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        max_length: int,
        seed: int = 0,
        shuffle: bool = True,
        packing: bool = True,
    ):
        super().__init__(examples, batch_size, max_length, packing)
        self.seed, self.shuffle = seed, shuffle
        self._order = (
            -1,
            np.zeros(0, np.int64),
        )  # the epoch last asked for, so as not to draw it at each step

    def with_seed(self, seed: int) -> "Batches":
        """The same rows in another order."""
        other = copy.copy(self)
        other.seed, other._order = seed, (-1, np.zeros(0, np.int64))
        return other

    @property
    def steps_per_epoch(self) -> int:
        """ceil(rows / batch_size)."""
        return -(-len(self.rows) // self.batch_size)

    def batch(self, step: int, rows: np.ndarray | Sequence[int] | None = None) -> Batch:
        """The batch of a step.

        Args:
            step: counts from 1, through all epochs.
            rows: the rows of the batch that are wanted (a process of many builds only its own); None is all.
        Returns:
            tokens, targets, segments, positions int32 [B, T], weights float32 [B, T].
        """
        wanted = range(self.batch_size) if rows is None else list(rows)
        chosen = self.rows_in(step)
        return self._fill([chosen[b] if b < len(chosen) else () for b in wanted], len(wanted))

    def examples_in(self, step: int) -> list[int]:
        """The examples of a step's batch, row by row."""
        return [e for row in self.rows_in(step) for e in row]

    def rows_in(self, step: int) -> list[tuple[int, ...]]:
        """Likewise, the examples of each row that is not empty."""
        if step < 1:
            raise ValueError(f"step {step}: steps count from 1")
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        order = self._epoch_order(epoch)[place * self.batch_size : (place + 1) * self.batch_size]
        return [self.rows[r] for r in order]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self.rows))
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
        return self._order[1]


class EvalBatches(_Rows):
    """Evaluation batches: every example exactly once, in a fixed order.

    Args:
        examples, batch_size, max_length, packing: as for `Batches`.
    """

    def __init__(self, examples: Examples, batch_size: int, max_length: int, packing: bool = True):
        super().__init__(examples, batch_size, max_length, packing)

    @property
    def num_batches(self) -> int:
        """ceil(rows / batch_size)."""
        return -(-len(self.rows) // self.batch_size)

    def batch(self, i: int, rows: np.ndarray | Sequence[int] | None = None) -> Batch:
        """Batch i, counted from 0; arrays and `rows` as in `Batches.batch`."""
        wanted = range(self.batch_size) if rows is None else list(rows)
        chosen = self._rows_of(i)
        return self._fill([chosen[b] if b < len(chosen) else () for b in wanted], len(wanted))

    def example_ids(self, i: int) -> np.ndarray:
        """Which example stands where in batch i.

        Returns:
            int32 [B, S + 1] for at most S segments in any row: entry [b, s] is the example of segment s in row b, and
            -1 where there is none (s = 0, the padding, always).
        """
        table = np.full((self.batch_size, self.most_segments + 1), -1, np.int32)
        for b, row in enumerate(self._rows_of(i)):
            table[b, 1 : len(row) + 1] = row
        return table

    def _rows_of(self, i: int) -> list[tuple[int, ...]]:
        if not 0 <= i < self.num_batches:
            raise IndexError(f"batch {i} of {self.num_batches}")
        return self.rows[i * self.batch_size : (i + 1) * self.batch_size]
