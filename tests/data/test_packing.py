"""Packing: every example once, nothing over the edge, and nearly nothing wasted."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlora.data.packing import efficiency, most_in_a_row, pack

LENGTHS = st.lists(st.integers(1, 50), max_size=60)


@given(LENGTHS, st.booleans())
def test_every_example_stands_in_exactly_one_row_and_fits(lengths, packing):
    rows = pack(np.array(lengths, np.int64), 50, packing=packing)
    assert sorted(e for row in rows for e in row) == list(range(len(lengths)))
    assert all(sum(lengths[e] for e in row) <= 50 for row in rows)


@given(LENGTHS)
def test_no_two_rows_could_be_one(lengths):
    rows = pack(np.array(lengths, np.int64), 50)
    fills = sorted(sum(lengths[e] for e in row) for row in rows)
    assert len(fills) < 2 or fills[0] + fills[1] > 50


@given(LENGTHS)
def test_each_example_went_into_the_fullest_row_it_fitted(lengths):
    """The same rows, found by looking at all of them every time."""
    rows: list[list[int]] = []
    for e in sorted(range(len(lengths)), key=lambda e: -lengths[e]):
        free = [50 - sum(lengths[x] for x in row) for row in rows]
        fits = [f for f in free if f >= lengths[e]]
        if fits:
            rows[free.index(min(fits))].append(e)
        else:
            rows.append([e])
    packed = pack(np.array(lengths, np.int64), 50)
    assert sorted(sum(lengths[e] for e in row) for row in packed) == sorted(
        sum(lengths[e] for e in r) for r in rows
    )


@given(LENGTHS.filter(bool), st.randoms(use_true_random=False))
def test_rows_depend_on_the_lengths_alone(lengths, random):
    """The same examples in another order fill the same rows, and so does any way of writing their lengths."""
    rows = pack(np.array(lengths, np.int64), 50)
    assert pack(np.array(lengths, np.int32), 50) == rows
    order = random.sample(range(len(lengths)), len(lengths))
    moved = pack(np.array([lengths[e] for e in order], np.int64), 50)
    filled = [sorted(sorted(ls[e] for e in row) for row in rs) for ls, rs in
              [(lengths, rows), ([lengths[e] for e in order], moved)]]  # fmt: skip
    assert filled[0] == filled[1]


@given(LENGTHS, st.booleans(), st.data())
def test_no_row_of_any_of_them_has_more_than_the_most(lengths, packing, data):
    some = [length for length in lengths if data.draw(st.booleans())]
    most = most_in_a_row(np.array(lengths, np.int64), 50, packing=packing)
    assert max(map(len, pack(np.array(some, np.int64), 50, packing=packing)), default=0) <= most
    if packing and lengths:  # and they do fit: no smaller number would hold for all
        assert sum(sorted(lengths)[:most]) <= 50


def test_without_packing_every_example_has_its_own_row():
    assert pack(np.array([3, 1, 2]), 10, packing=False) == [(0,), (1,), (2,)]


def test_rows_follow_the_order_of_their_first_example():
    assert pack(np.array([4, 10, 6, 9]), 10) == [(0, 2), (1,), (3,)]


def test_fifty_thousand_examples_take_less_than_a_second():
    lengths = np.random.default_rng(0).integers(20, 900, 50_000)
    start = time.process_time()
    rows = pack(lengths, 2048)
    assert time.process_time() - start < 1
    assert efficiency(lengths, len(rows), 2048) > 0.99


def test_efficiency_is_the_share_of_positions_in_use():
    assert efficiency(np.array([5, 10]), 2, 10) == 0.75
    assert efficiency(np.array([]), 0, 10) == 0.0


@pytest.mark.parametrize("length", [0, 11])
def test_a_length_that_fits_no_row_is_a_mistake_of_the_caller(length):
    with pytest.raises(ValueError, match=r"holds 1\.\.10"):
        pack(np.array([5, length]), 10)
