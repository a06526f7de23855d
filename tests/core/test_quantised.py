"""Kernels in 8 and 4 bits: what they lose, and that products with them are those with the arrays they stand for."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from scipy.stats import norm

from jaxlora.core.products import contract
from jaxlora.core.quantised import (
    BLOCK,
    KINDS,
    NF4,
    TABLE,
    Quantised,
    as_array,
    block_of,
    like,
    plain,
    quantise,
    whole,
)

GAP = max(high - low for low, high in itertools.pairwise(NF4))


def kernel(inputs: int, outputs: int, seed: int = 0) -> np.ndarray:
    """Normal, but for a block of zeros, one that is large and one that is tiny."""
    draw = np.random.default_rng(seed).standard_normal((inputs, outputs)).astype(np.float32)
    block = block_of(inputs)
    draw[:block, 0], draw[:block, 1], draw[:block, 2] = 0, draw[:block, 1] * 1e30, draw[:block, 2] * 1e-30
    return draw


def test_the_code_is_the_one_of_the_paper():
    """Quantiles of a normal distribution, eight above zero and seven below, over the largest (QLoRA, appendix E)."""
    tail = 0.9677083
    above = norm.ppf(np.linspace(tail, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(tail, 0.5, 8)[:-1])
    np.testing.assert_allclose(np.sort([*below, 0, *above]) / above.max(), NF4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 5), (192, 7), (96, 3), (48, 4), (3584, 130)])
def test_a_round_trip_is_within_its_bound(kind, inputs, outputs):
    stored = kernel(inputs, outputs)
    found = quantise(stored, kind)
    expected = like(stored.shape, np.float32, kind)
    assert found.shape == stored.shape
    assert found.size == stored.size
    assert (found.values.shape, found.scales.shape) == (expected.values.shape, expected.scales.shape)
    assert (found.values.dtype, found.scales.dtype) == (expected.values.dtype, expected.scales.dtype)
    again = np.asarray(plain(found))
    block = block_of(inputs)
    scale = np.repeat(found.scales.astype(np.float32), block, axis=0)
    # int8 is rounded to whole scales; NF4 to the nearest entry, and what is above the largest entry to that.
    bound = scale * (0.5 if kind == "int8" else max(GAP / 2, 1 / 256))
    assert (np.abs(stored - again) <= bound * (1 + 1e-5)).all()
    largest = np.abs(stored).reshape(-1, block, outputs).max(axis=1)
    np.testing.assert_allclose(
        found.scales.astype(np.float32) * KINDS[kind].largest, largest, rtol=1 / 256, atol=1e-37
    )
    np.testing.assert_array_equal(again[:block, 0], 0)


def test_every_value_takes_the_nearest_entry():
    stored = np.random.default_rng(1).uniform(-1, 1, (BLOCK, 300)).astype(np.float32)
    stored[0] = 1  # so that the scale is 1
    found = np.asarray(plain(quantise(stored, "nf4")))
    code = np.array(NF4, np.float32)
    nearest = code[np.abs(stored[..., None] - code).argmin(axis=-1)]
    np.testing.assert_array_equal(found, nearest)


def test_the_entries_themselves_come_back_exactly():
    stored = np.tile(np.array(NF4, np.float32), 4)[:, None] * np.float32([0.5, 2, 24])
    np.testing.assert_array_equal(np.asarray(plain(quantise(stored, "nf4"))), stored)
    whole = np.arange(-127, 129, 2, dtype=np.float32)[:, None] * np.float32([0.25, 4])
    whole[[0, 64]] = -127 * np.float32([0.25, 4])  # the largest of each block
    np.testing.assert_array_equal(np.asarray(plain(quantise(whole, "int8"))), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_order_and_pieces_change_nothing(kind, monkeypatch):
    stored = kernel(128, 50)
    one = quantise(stored, kind)
    monkeypatch.setattr("jaxlora.core.quantised._AT_ONCE", 128 * 7)
    other = quantise(np.asfortranarray(stored), kind)
    np.testing.assert_array_equal(one.values, other.values)
    np.testing.assert_array_equal(one.scales, other.scales)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_does_not_become_a_number(kind, odd):
    stored = kernel(128, 4)
    stored[70, 3] = odd
    found = np.asarray(plain(quantise(stored, kind)))
    assert not np.isfinite(found[64:, 3]).any()
    assert np.isfinite(found[:64]).all()
    assert np.isfinite(found[:, :3]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_products_and_gradients_are_those_of_the_array(kind):
    """And nothing is kept for the backward pass but the bits."""
    held = jax.tree.map(jnp.asarray, quantise(kernel(64, 40, seed=3)[:, 3:], kind))
    x = jnp.asarray(np.random.default_rng(2).standard_normal((2, 3, 64)), jnp.float32)
    out = jnp.asarray(np.random.default_rng(3).standard_normal((2, 3, 37)), jnp.float32)

    def loss(x, y):
        return jnp.sum(contract("BTI,IO->BTO", x, y) * out)

    np.testing.assert_array_equal(contract("BTI,IO->BTO", x, held), contract("BTI,IO->BTO", x, plain(held)))
    np.testing.assert_array_equal(jax.grad(loss)(x, held), jax.grad(loss)(x, plain(held)))
    _, pullback = jax.vjp(lambda x: contract("BTI,IO->BTO", x, held), x)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(pullback))
    assert kept <= held.values.nbytes + held.scales.nbytes


def test_a_kernel_of_layers_is_sliced_mapped_and_batched_as_its_arrays():
    layers = [quantise(kernel(64, 8, seed)[:, 3:].astype(ml_dtypes.bfloat16), "nf4") for seed in range(3)]
    stacked: Quantised = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    assert stacked.shape == (3, 64, 5)
    assert plain(stacked).dtype == jnp.bfloat16
    for i, layer in enumerate(jax.lax.map(plain, stacked)):
        np.testing.assert_array_equal(layer, plain(layers[i]))
        np.testing.assert_array_equal(layer, plain(stacked)[i])


# ---- tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "words"), [(64, 5), (192, 7), (48, 4), (3584, 130)])
def test_a_table_is_a_kernel_the_other_way_round(kind, width, words):
    """Row for row: a word's numbers are quantised as an output's inputs."""
    stored = kernel(width, words).T
    table, other = quantise(stored, kind, TABLE), quantise(stored.T, kind)
    expected = like(stored.shape, np.float32, kind, TABLE)
    assert (table.shape, table.size, table.kind) == (stored.shape, stored.size, kind)
    assert (table.values.shape, table.values.dtype) == (expected.values.shape, expected.values.dtype)
    assert (table.scales.shape, table.scales.dtype) == (expected.scales.shape, expected.scales.dtype)
    assert expected.scales.shape == (words, width // block_of(width))
    assert table.values.flags.c_contiguous
    np.testing.assert_array_equal(table.values, other.values.T)
    np.testing.assert_array_equal(table.scales, other.scales.T)
    np.testing.assert_array_equal(plain(table), np.asarray(plain(other)).T)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_table_are_taken_before_they_become_arrays(kind):
    table = jax.tree.map(jnp.asarray, quantise(kernel(128, 30).T.astype(ml_dtypes.bfloat16), kind, TABLE))
    words = jnp.asarray([[3, 0, 29], [7, 7, 1]])
    rows: Quantised = jax.tree.map(lambda x: jnp.take(x, words, axis=0), table)
    assert rows.shape == (2, 3, 128)
    assert plain(rows).dtype == jnp.bfloat16
    np.testing.assert_array_equal(plain(rows), plain(table)[words])


@pytest.mark.parametrize("kind", KINDS)
def test_a_tables_memory_order_and_pieces_change_nothing(kind, monkeypatch):
    stored = kernel(128, 50).T
    one = quantise(np.ascontiguousarray(stored), kind, TABLE)
    monkeypatch.setattr("jaxlora.core.quantised._AT_ONCE", 128 * 7)
    other = quantise(np.asfortranarray(stored), kind, TABLE)
    np.testing.assert_array_equal(one.values, other.values)
    np.testing.assert_array_equal(one.scales, other.scales)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at_once", [7, 10, 1000])
def test_a_table_becomes_an_array_some_words_at_a_time(kind, at_once, monkeypatch):
    monkeypatch.setattr("jaxlora.core.quantised._WORDS_AT_ONCE", at_once)
    table = jax.tree.map(jnp.asarray, quantise(kernel(128, 30).T.astype(ml_dtypes.bfloat16), kind, TABLE))
    expected = plain(table)
    for found in (jax.jit(whole)(table), jax.jit(lambda x: whole(x, None, 2))(table), as_array(table)):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(as_array(expected), expected)
