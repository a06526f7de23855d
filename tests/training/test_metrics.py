"""Metrics from totals."""

import math

import pytest

from jaxlora.training.metrics import METRICS, Totals


def test_metrics_of_known_totals():
    totals = Totals(nll=6.0, correct=3.0, weight=4.0)
    found = {name: metric(totals) for name, metric in METRICS.items()}
    assert found == {"nll": 1.5, "perplexity": pytest.approx(math.exp(1.5)), "token_accuracy": 0.75}


def test_perplexity_of_a_diverged_model_is_infinite_not_an_error():
    assert METRICS["perplexity"](Totals(nll=1e6, correct=0.0, weight=1.0)) == math.inf
