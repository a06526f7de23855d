"""Who is dropped at a rung, and which trials have a slot."""

import math
import re

import numpy as np
import pytest

from jaxlora.core.errors import InputError
from jaxlora.sweeps import halving
from jaxlora.sweeps.ledger import Ledger, Waiting
from jaxlora.sweeps.lockstep import layout
from jaxlora.sweeps.trials import Halving


def columns(mean: float, noise: float = 0.0, seed: int = 0, count: int = 40) -> dict:
    """An evaluation whose examples differ by one nat, and by `noise` from those of another seed."""
    shared = np.random.default_rng(99).standard_normal(count)
    own = noise * np.random.default_rng(seed).standard_normal(count)
    nll = mean + shared - shared.mean() + own - own.mean()
    return {"example": list(range(count)), "nll": nll.tolist(), "tokens": [3] * count}


def test_the_best_part_is_kept_and_the_others_are_told_why():
    means = {"a": 1.0, "b": 1.3, "c": 1.1, "d": 1.2}
    found = {name: columns(mean, 0.01, seed) for seed, (name, mean) in enumerate(means.items())}
    out = halving.dropped(Halving((0.5,)), found)
    assert set(out) == {"b", "d"}
    assert out["d"].startswith("eval nll 1.2000, and the last of 2 kept has 1.1000 (+0.1000 ± 0.00")
    assert out["d"].endswith("40 examples)")
    assert set(halving.dropped(Halving((0.5,), eta=4), found)) == {"b", "c", "d"}


def test_who_is_tied_with_the_last_kept_one_stays_unless_told():
    """d is 0.02 worse than c, and their examples differ by 0.2: a tenth of a standard deviation."""
    found = {"a": columns(1.0), "c": columns(1.1), "d": columns(1.12, 0.2, 5), "e": columns(1.5, 0.2, 6)}
    assert set(halving.dropped(Halving((0.5,)), found)) == {"e"}
    assert set(halving.dropped(Halving((0.5,), drop_ties=True), found)) == {"d", "e"}


def test_what_is_not_finite_is_dropped_whatever_is_left():
    broken = columns(1.0)
    broken["nll"][3] = math.nan
    assert halving.mean(broken) == math.inf
    assert halving.mean(columns(1.25)) == pytest.approx(1.25)
    out = halving.dropped(Halving((0.5,)), {"a": columns(1.0), "b": columns(2.0), "c": broken})
    assert out == {"c": "its eval nll is not finite"}  # two of three are kept
    assert set(halving.dropped(Halving((0.5,)), {"c": broken, "d": broken})) == {"c", "d"}


NAMES = tuple("abcdefgh")


@pytest.mark.parametrize(
    ("ended", "made", "left"),
    [
        ({}, 9, "abcdefgh"),
        ({"a": 3, "b": 3, "c": 3}, 9, "abcdefgh"),  # five go on: not worth a compilation
        ({"a": 3, "b": 4, "c": 4, "d": 7}, 6, "abcdefgh"),
        ({"a": 3, "b": 4, "c": 4, "d": 7}, 7, "efgh"),
        ({"a": 3, "b": 4, "c": 4, "d": 7, "e": 8}, 99, "efgh"),
        ({"a": 3, "b": 4, "c": 4, "d": 7, "e": 8, "h": 8}, 99, "fg"),
        (dict.fromkeys("abcdefg", 5), 5, "h"),
    ],
)
def test_a_stack_is_made_smaller_when_half_of_it_has_ended(ended, made, left):
    assert layout(NAMES, ended, made) == tuple(left)


def test_slots_come_in_multiples_of_the_parts_that_devices_are_in():
    assert layout(NAMES, dict.fromkeys("abcd", 5), 5, parts=4) == tuple("efgh")
    assert layout(NAMES, dict.fromkeys("abcdef", 5), 5, parts=8) == NAMES


def test_a_layout_does_not_depend_on_what_ends_later():
    """What a resumed sweep knows of later steps changes nothing of the step that it makes again."""
    ended = {"c": 2, "a": 4, "f": 4, "b": 6, "h": 9, "g": 9}
    for made in range(11):
        known = {name: step for name, step in ended.items() if step <= made}
        assert layout(NAMES, ended, made) == layout(NAMES, known, made)


def test_the_ledger_keeps_what_others_wrote(tmp_path):
    (tmp_path / "sweep.json").write_text('{"config": "lr"}')
    ledger = Ledger(tmp_path)
    ledger.add_stacks([["a", "b"], ["c"]])
    ledger.add_stacks([["d"]])
    facts = {"rung": 1, "step": 5, "made": 7, "reason": "worse"}
    ledger.decide([0, 1], 1, {"b": facts})
    again = Ledger(tmp_path)
    assert again.stacks == [["a", "b"], ["c"], ["d"]]
    assert [again.cohort(number) for number in range(3)] == [[0, 1], [0, 1], [2]]
    assert again.rung([0, 1], 1) == {"b": facts}
    assert again.rung([2], 1) is None
    assert again.dropped == {"b": facts}
    assert '"config": "lr"' in (tmp_path / "sweep.json").read_text()


def test_a_trial_that_waits_is_known_until_it_was_decided_upon(tmp_path):
    waiting = Waiting(1, 5, 7, {"example": [0], "nll": [1.5], "tokens": [3]})
    Ledger(tmp_path).wait("a", waiting)
    assert Ledger(tmp_path).waiting("a") == waiting
    assert Ledger(tmp_path).waiting("b") is None
    for _ in range(2):
        Ledger(tmp_path).end_wait("a")
        assert Ledger(tmp_path).waiting("a") is None


def test_what_cannot_be_noted_stops_the_sweep_with_the_remedy(tmp_path):
    (tmp_path / ".rungs").touch()  # a file where the folder should be
    with pytest.raises(InputError) as caught:
        Ledger(tmp_path).keep_judged("a", 5, {"example": [0], "nll": [1.5], "tokens": [3]})
    assert re.fullmatch(
        rf"{tmp_path}/.rungs/a.json could not be written \(.+\)\.\nMake room, and repeat the command: .*",
        str(caught.value),
    )
