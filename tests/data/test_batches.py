"""Examples and batches: counts, the cache, and batches as a function of (seed, step)."""

import os
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlora.core.errors import InputError
from jaxlora.data import batches
from jaxlora.data.batches import Batches, EvalBatches, Examples, prepare
from jaxlora.data.sources import load_conversations


def examples_of(lengths, max_length=50):
    """Examples of these many positions, with ids that tell which example and place they are, trained here and there."""
    ids = [1000 * e + np.arange(n + 1) for e, n in enumerate(lengths, 1)]
    trained = [(np.arange(n + 1) % 3 != 1) | (np.arange(n + 1) == n) for n in lengths]
    return Examples(
        ids=np.concatenate([np.zeros(0, np.int32), *ids]).astype(np.int32),
        trained=np.concatenate([np.zeros(0, bool), *trained]),
        offsets=np.cumsum([0, *[n + 1 for n in lengths]]),
        source_rows=np.arange(len(lengths)),
        conversations=len(lengths),
        truncated=0,
        dropped=0,
        max_length=max_length,
        name="made up",
    )


def segments_of(batch):
    """(tokens, targets, weights, positions) of every segment of a batch."""
    for b in range(len(batch["tokens"])):
        for segment in range(1, batch["segments"][b].max() + 1):
            where = batch["segments"][b] == segment
            yield tuple(batch[name][b][where] for name in ("tokens", "targets", "weights", "positions"))


LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=40)


# ---- batches


@given(LENGTHS, st.booleans(), st.integers(1, 7))
def test_a_packed_row_holds_its_examples_as_if_each_were_alone(lengths, packing, batch_size):
    examples = examples_of(lengths)
    batched = EvalBatches(examples, batch_size, 50, packing=packing)
    for i in range(batched.num_batches):
        batch = batched.batch(i)
        assert {name: (a.shape, a.dtype.name) for name, a in batch.items()} == {
            name: ((batch_size, 50), "float32" if name == "weights" else "int32")
            for name in ("tokens", "targets", "weights", "segments", "positions")
        }
        for tokens, targets, weights, positions in segments_of(batch):
            ids, trained = examples[tokens[0] // 1000 - 1]
            assert tokens.tolist() == ids[:-1].tolist()
            assert targets.tolist() == ids[1:].tolist()
            assert weights.tolist() == trained[1:].tolist()
            assert positions.tolist() == list(range(len(ids) - 1))
        padding = batch["segments"] == 0
        assert all(not array[padding].any() for array in batch.values())


@given(LENGTHS, st.booleans(), st.integers(1, 7), st.integers(0, 5))
def test_every_epoch_shows_each_example_exactly_once(lengths, packing, batch_size, seed):
    batched = Batches(examples_of(lengths), batch_size, 50, seed=seed, packing=packing)
    steps = batched.steps_per_epoch
    for epoch in range(3):
        shown = [e for step in range(1, steps + 1) for e in batched.examples_in(epoch * steps + step)]
        assert sorted(shown) == list(range(len(lengths)))


@given(LENGTHS, st.integers(1, 7))
def test_evaluation_shows_each_example_once_and_says_where(lengths, batch_size):
    batched = EvalBatches(examples_of(lengths), batch_size, 50)
    found = []
    for i in range(batched.num_batches):
        batch, ids = batched.batch(i), batched.example_ids(i)
        assert ids.shape == (batch_size, batched.most_segments + 1)
        assert (ids[:, 0] == -1).all()
        for b, segment in np.argwhere(ids >= 0):
            place = np.flatnonzero(batch["segments"][b] == segment)
            assert batch["tokens"][b, place[0]] // 1000 - 1 == ids[b, segment]
        assert (ids >= 0).sum() == sum(len(np.unique(row[row > 0])) for row in batch["segments"])
        found += ids[ids >= 0].tolist()
    assert sorted(found) == list(range(len(lengths)))


@given(LENGTHS, st.booleans(), st.integers(1, 7), st.integers(0, 5))
def test_an_epochs_weights_are_its_trained_tokens(lengths, packing, batch_size, seed):
    examples = examples_of(lengths)
    training = Batches(examples, batch_size, 50, seed=seed, packing=packing)
    evaluation = EvalBatches(examples, batch_size, 50, packing=packing)
    for batches_ in (
        [training.batch(step) for step in range(1, training.steps_per_epoch + 1)],
        [evaluation.batch(i) for i in range(evaluation.num_batches)],
    ):
        assert sum(int(batch["weights"].sum()) for batch in batches_) == examples.trained_tokens
        for row, places in zip(
            np.concatenate([batch["segments"] for batch in batches_]),
            np.concatenate([batch["positions"] for batch in batches_]),
            strict=True,
        ):
            filled = np.count_nonzero(row)
            assert not row[filled:].any()  # padding comes last
            starts = np.flatnonzero(np.diff(row[:filled], prepend=0))
            assert row[starts].tolist() == list(range(1, len(starts) + 1))
            assert np.flatnonzero(places[:filled] == 0).tolist() == starts.tolist()


@given(
    LENGTHS,
    st.integers(1, 7),
    st.integers(0, 5),
    st.lists(st.integers(1, 60), max_size=8),
    st.integers(1, 60),
)
def test_what_was_asked_for_before_changes_no_batch(lengths, batch_size, seed, before, step):
    examples = examples_of(lengths)
    asked = Batches(examples, batch_size, 50, seed=seed)
    for earlier in before:
        asked.batch(earlier)
        asked.examples_in(earlier)
    assert same(asked.batch(step), Batches(examples, batch_size, 50, seed=seed).batch(step))


def same(one, other):
    return all(np.array_equal(one[name], other[name]) for name in one)


def test_a_batch_depends_on_seed_and_step_alone():
    examples = examples_of([3, 8, 20, 5, 13, 40, 50, 2] * 3)
    first = Batches(examples, 2, 50, seed=7)
    forwards = [first.batch(step) for step in range(1, 30)]
    second = Batches(examples, 2, 50, seed=7)
    backwards = [second.batch(step) for step in reversed(range(1, 30))][::-1]
    assert all(map(same, forwards, backwards))
    assert not all(
        map(same, forwards, [Batches(examples, 2, 50, seed=8).batch(step) for step in range(1, 30)])
    )


def test_epochs_are_shuffled_anew_and_differently():
    batched = Batches(examples_of([50] * 20), 1, 50, seed=0)
    epochs = [[batched.examples_in(epoch * 20 + step)[0] for step in range(1, 21)] for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    plain = Batches(examples_of([50] * 20), 1, 50, shuffle=False)
    assert [plain.examples_in(step)[0] for step in range(1, 41)] == [*range(20), *range(20)]


def test_the_short_last_batch_is_filled_with_empty_rows():
    batched = Batches(examples_of([50] * 5), 2, 50)
    assert batched.steps_per_epoch == 3
    last = batched.batch(3)
    assert last["segments"].any(axis=1).tolist() == [True, False]
    assert last["weights"][1].sum() == 0
    assert len(batched.examples_in(3)) == 1


def test_a_process_builds_only_its_own_rows():
    examples = examples_of([3, 8, 20, 5, 13, 40, 50, 2] * 3)
    for batched in (Batches(examples, 4, 50), EvalBatches(examples, 4, 50)):
        for step in (1, 2):
            full = batched.batch(step)
            halves = [batched.batch(step, range(0, 2)), batched.batch(step, np.array([2, 3]))]
            assert same(full, {name: np.concatenate([half[name] for half in halves]) for name in full})


def test_steps_count_from_one():
    with pytest.raises(ValueError, match="count from 1"):
        Batches(examples_of([5]), 1, 50).batch(0)
    with pytest.raises(IndexError):
        EvalBatches(examples_of([5]), 1, 50).batch(1)


# ---- preparing


@pytest.fixture
def source(write, talk):
    rows = [{"messages": talk(f"Question {i}?", f"Answer {i}.", "more", "and more " * i)} for i in range(8)]
    return load_conversations(write("d.jsonl", *rows))


def test_an_example_is_cut_after_its_last_trained_token(write, talk, chatml, tmp_path):
    source = load_conversations(write("d.jsonl", {"messages": talk("a", "b", "never answered")}))
    examples = prepare(source, chatml, 100, cache=tmp_path)
    (encoded,) = chatml.encode_batch([source[0]])
    last = np.flatnonzero(encoded.trained)[-1]
    assert examples[0].ids.tolist() == encoded.ids[: last + 1].tolist()
    assert examples.tokens == last + 1
    assert examples.trained_tokens == encoded.trained.sum()


def test_cut_and_dropped_conversations_are_counted_and_said(source, chatml, tmp_path):
    encoded = chatml.encode_batch(source.conversations(0, len(source)))
    full = [int(np.flatnonzero(e.trained)[-1]) for e in encoded]
    first = [int(np.flatnonzero(e.trained)[0]) for e in encoded]
    for max_length in (min(first), max(first), full[3], max(full)):
        examples = prepare(source, chatml, max_length, cache=tmp_path)
        kept = [row for row in range(8) if first[row] <= max_length]
        assert examples.source_rows.tolist() == kept
        assert examples.dropped == 8 - len(kept)
        assert examples.truncated == sum(full[row] > max_length for row in kept)
        assert examples.lengths.max() <= max_length
        said = " ".join(examples.describe())
        assert ("are cut at" in said, "are dropped" in said) == (examples.truncated > 0, examples.dropped > 0)
        for e, row in enumerate(kept):
            assert examples[e].ids.tolist() == encoded[row].ids[: len(examples[e].ids)].tolist()
            assert examples[e].trained[-1]
    assert prepare(source, chatml, max(full), cache=tmp_path).truncated == 0


def test_nothing_left_of_any_row_is_wrong_input(source, chatml, tmp_path):
    with pytest.raises(InputError, match=r"data\.max_length 3; raise it"):
        prepare(source, chatml, 3, cache=tmp_path)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant turn in it has any text"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]},
            "no assistant turn",
        ),
        ({"messages": [{"role": "robot", "content": "x"}]}, 'unknown role "robot"'),
    ],
)
def test_the_row_that_cannot_be_used_is_named(row, said, write, talk, chatml, tmp_path):
    path = write("d.jsonl", *[{"messages": talk("a", "b")}] * batches.CHUNK, row)
    with pytest.raises(InputError) as error:
        prepare(load_conversations(path), chatml, 100, cache=tmp_path)
    assert said in str(error.value)
    assert f"{path}, row {batches.CHUNK + 1}:" in str(error.value)


def test_progress_is_told_while_tokenising(write, talk, chatml, tmp_path):
    rows = [{"messages": talk(f"Question {i}", "b")} for i in range(2 * batches.CHUNK + 1)]
    told = []
    source = load_conversations(write("d.jsonl", *rows))
    prepare(source, chatml, 100, cache=tmp_path, progress=lambda done, total: told.append((done, total)))
    assert told == [(min(n * batches.CHUNK, len(rows)), len(rows)) for n in (1, 2, 3)]


def test_the_first_examples_only(source, chatml, tmp_path):
    examples = prepare(source, chatml, 500, cache=tmp_path)
    few = examples.first(3)
    assert len(few) == 3
    assert few[2].ids.tolist() == examples[2].ids.tolist()
    assert (few.tokens, len(examples.first(99))) == (examples.offsets[3], 8)
    chosen = examples.select(np.array([6, 0, 5]))
    assert chosen.source_rows.tolist() == examples.source_rows[[6, 0, 5]].tolist()
    for mine, e in zip(range(3), (6, 0, 5), strict=True):
        for found, expected in zip(chosen[mine], examples[e], strict=True):
            np.testing.assert_array_equal(found, expected)


# ---- the cache


def arrays(examples):
    return [
        examples.ids.tolist(),
        examples.trained.tolist(),
        examples.offsets.tolist(),
        examples.source_rows.tolist(),
    ]


def test_the_second_time_nothing_is_tokenised(source, chatml, tmp_path, monkeypatch):
    fresh = prepare(source, chatml, 60, cache=tmp_path)
    monkeypatch.setattr(chatml, "encode_batch", None)
    stored = prepare(source, chatml, 60, cache=tmp_path)
    assert arrays(stored) == arrays(fresh)
    assert (stored.truncated, stored.dropped, stored.describe()) == (
        fresh.truncated,
        fresh.dropped,
        fresh.describe(),
    )


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied"])
def test_a_broken_entry_is_made_again(damage, source, chatml, tmp_path):
    fresh = prepare(source, chatml, 60, cache=tmp_path)
    (entry,) = tmp_path.glob("*.npz")
    content = bytearray(entry.read_bytes())
    if damage == "flipped":
        content[300] ^= 1
    entry.write_bytes({"cut": content[: len(content) // 2], "flipped": content, "emptied": b""}[damage])
    assert arrays(prepare(source, chatml, 60, cache=tmp_path)) == arrays(fresh)
    assert [path.name for path in tmp_path.glob("*.npz")] == [entry.name]
    assert arrays(prepare(source, chatml, 60, cache=tmp_path)) == arrays(fresh)


def test_other_settings_are_other_entries(source, chatml, byte_level, tmp_path):
    prepare(source, chatml, 60, cache=tmp_path)
    prepare(source, chatml, 61, cache=tmp_path)
    prepare(source.select([1, 2]), chatml, 60, cache=tmp_path)
    prepare(source, type(chatml)(byte_level(), train_on="all"), 60, cache=tmp_path)
    assert len(list(tmp_path.glob("*.npz"))) == 4


@pytest.mark.skipif(
    sys.platform == "win32" or os.geteuid() == 0, reason="needs a folder that refuses writing"
)
def test_a_cache_that_cannot_be_written_costs_only_time(source, chatml, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert len(prepare(source, chatml, 60, cache=locked)) == 8


def test_a_cache_in_an_impossible_place_costs_only_time(source, chatml, tmp_path):
    (tmp_path / "file").write_text("")
    assert len(prepare(source, chatml, 60, cache=tmp_path / "file" / "below")) == 8
