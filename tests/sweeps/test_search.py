"""A search: its waves follow from what came of the ones before, and from nothing else."""

import math

import pytest

from jaxlora.sweeps.ranges import ranges
from jaxlora.sweeps.search import SAMPLERS, Search, Told, propose

RATE, RANK = "optim.learning_rate", "lora.rank"
RANGES = ranges("r", {RATE: ("log_uniform", 1e-5, 1e-1), RANK: ("choice", 8, 16, 32)})


def told(changes):
    """A valley at a rate of 1e-3; too high a rate has no nll, too low a one is dropped on the way."""
    rate = changes[RATE]
    return Told(
        changes, None if rate > 5e-2 else 1 + abs(math.log10(rate / 1e-3)), 5 if rate < 5e-5 else None
    )


def waves(search, count):
    before: list[Told] = []
    found = []
    for wave in range(count):
        found.append(propose(search, wave, before))
        before += [told(changes) for changes in found[-1]]
    return found


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_trials_are_all_different_and_within_their_ranges(sampler):
    found = [changes for wave in waves(Search(RANGES, sampler, 3, 6, 0), 3) for changes in wave]
    assert len(found) == 18
    assert len({tuple(changes.items()) for changes in found}) == 18
    assert all(1e-5 <= changes[RATE] <= 1e-1 and changes[RANK] in (8, 16, 32) for changes in found)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_wave_follows_from_the_outcomes_alone(sampler):
    search = Search(RANGES, sampler, 3, 4, 1)
    first, second, _ = waves(search, 3)
    assert propose(search, 1, [told(changes) for changes in first]) == second
    assert propose(search, 0, []) == first
    assert first != propose(Search(RANGES, sampler, 3, 4, 2), 0, [])


def test_outcomes_matter():
    search = Search(RANGES, "tpe", 3, 4, 0)
    first = propose(search, 0, [])
    upside_down = [Told(changes, 10 - (told(changes).nll or 0)) for changes in first]
    assert propose(search, 1, [told(changes) for changes in first]) != propose(search, 1, upside_down)


def test_parzen_estimators_come_closer_than_chance():
    """Over ten seeds, the last of five waves is nearer to the valley than the first, which was drawn by chance."""

    def distance(wave):
        return sum(abs(math.log10(changes[RATE] / 1e-3)) for changes in wave) / len(wave)

    found = [waves(Search(RANGES, "tpe", 5, 6, seed), 5) for seed in range(10)]
    assert sum(distance(one[-1]) for one in found) < 0.8 * sum(distance(one[0]) for one in found)


def test_a_search_ends_when_there_is_nothing_left():
    few = ranges("r", {RANK: ("choice", 8, 16)})
    search = Search(few, "tpe", 3, 4, 0)
    first = propose(search, 0, [])
    assert sorted(changes[RANK] for changes in first) == [8, 16]
    assert propose(search, 1, [Told(changes, 1.0) for changes in first]) == []
