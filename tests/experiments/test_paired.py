"""The paired difference: its value, its error, and when it says nothing."""

import math

import numpy as np
import pytest

from jaxlora.experiments.paired import difference


def columns(values, tokens=None, examples=None):
    count = len(values)
    return {
        "example": list(examples if examples is not None else range(count)),
        "nll": list(values),
        "tokens": list(tokens if tokens is not None else [7] * count),
    }


def test_it_is_the_difference_of_the_token_weighted_means():
    draw = np.random.default_rng(0)
    old, new, tokens = draw.normal(2, 1, 30), draw.normal(1.9, 1, 30), draw.integers(1, 50, 30)
    found = difference(columns(old, tokens), columns(new, tokens))
    assert found is not None
    assert found.mean == pytest.approx(
        np.average(new, weights=tokens) - np.average(old, weights=tokens), rel=1e-12
    )
    assert found.examples == 30


def test_with_equal_weights_it_is_the_textbook_paired_t():
    draw = np.random.default_rng(1)
    old = draw.normal(2, 1, 25)
    change = draw.normal(0.1, 0.3, 25)
    found = difference(columns(old), columns(old + change))
    assert found is not None
    assert found.standard_error == pytest.approx(change.std(ddof=1) / 5, rel=1e-9)
    assert found.z == pytest.approx(change.mean() / (change.std(ddof=1) / 5), rel=1e-9)


def test_the_error_is_the_spread_over_draws_of_the_examples():
    """Against the thing itself: 2,000 samples of 200 examples, ragged weights that go with the change."""
    draw = np.random.default_rng(2)
    means, errors = [], []
    for _ in range(2000):
        tokens = draw.integers(1, 40, 200)
        old = draw.normal(2, 1, 200)
        new = old + draw.normal(0.002 * tokens, 0.2)
        found = difference(columns(old, tokens), columns(new, tokens))
        assert found is not None
        means.append(found.mean)
        errors.append(found.standard_error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.05)


def test_only_shared_examples_count():
    found = difference(
        columns([1, 2, 3, 4], examples=[0, 1, 2, 3]), columns([5, 2, 3, 9], examples=[1, 2, 3, 8])
    )
    assert found is not None
    assert found.examples == 3
    assert found.mean == pytest.approx((5 - 2 + 2 - 3 + 3 - 4) / 3)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (None, columns([1, 2, 3])),
        (columns([1, 2, 3]), None),
        (columns([1, 2]), columns([1, 2])),
        (columns([1, 2, math.nan]), columns([1, 2, 3])),
        (columns([1, 2, None]), columns([1, 2, 3])),  # a number that was not finite, read back
    ],
)
def test_it_says_nothing_without_data(old, new):
    assert difference(old, new) is None


def test_no_change_at_all_is_zero_errors_away():
    found = difference(columns([1, 2, 3]), columns([1, 2, 3]))
    assert found is not None
    assert (found.mean, found.z) == (0.0, 0.0)
    shifted = difference(columns([1, 2, 3]), columns([2, 3, 4]))
    assert shifted is not None
    assert shifted.z == math.inf
