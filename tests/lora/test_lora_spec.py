"""An adapter's constants: names resolved, limits held, the scale of both scalings."""

import math

import pytest

from jaxlora.core.errors import InputError
from jaxlora.lora.spec import TARGETS, LoraSpec, resolve_targets


@pytest.mark.parametrize(
    ("written", "resolved"),
    [
        ("all-linear", TARGETS),
        (("all-linear",), TARGETS),
        ("v_proj,q_proj", ("q_proj", "v_proj")),
        ("v_proj, q_proj", ("q_proj", "v_proj")),
        (["down_proj", "q_proj", "q_proj"], ("q_proj", "down_proj")),
        (("q_proj", "all-linear"), TARGETS),
    ],
)
def test_targets_are_resolved_in_one_order(written, resolved):
    assert resolve_targets(written) == resolved


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("q_porj", "'q_porj'.*all-linear.*q_proj.*down_proj"),
        (("q_proj", "lm_head"), "'lm_head'"),
        ((), "empty"),
        ("", "empty"),
    ],
)
def test_unknown_targets_are_refused_with_the_allowed_ones(written, said):
    with pytest.raises(InputError, match=said):
        resolve_targets(written)


def test_scale():
    assert LoraSpec(rank=8, alpha=32.0).scale == 4.0
    assert LoraSpec(rank=8, alpha=32.0, scaling="rslora").scale == 32.0 / math.sqrt(8)


def test_equal_whatever_the_order_of_the_targets():
    assert LoraSpec(targets=("v_proj", "q_proj")) == LoraSpec(targets=("q_proj", "v_proj"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 0},
        {"rank": True},
        {"alpha": 0.0},
        {"alpha": math.inf},
        {"alpha": math.nan},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"scaling": "alpha"},
        {"targets": ("x",)},
    ],
)
def test_impossible_values_are_refused_by_name(wrong):
    with pytest.raises(InputError, match=f"lora.{next(iter(wrong))}"):
        LoraSpec(**wrong)
