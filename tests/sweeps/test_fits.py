"""How many trials are trained at once: what the compiler says fits, or what the person says."""

import pytest

from jaxlora.config.build import programs, stacking
from jaxlora.config.build.sweeping import _waves
from jaxlora.core.errors import InputError
from jaxlora.runs.progress import Progress
from tests.sweeps.test_stack import config, form
from tests.train.test_memory import Lowered

TRIAL = 10_000_000
"""Bytes that training takes for each trial; the compiler gives up above 6 of them."""


@pytest.fixture
def fit(monkeypatch, capsys):
    """fit(bytes of a device, trials, at_once) -> (so many at once, what was said); counts what was compiled."""
    asked: list[int] = []

    def lower_train(form: stacking.Form, count: int) -> Lowered:
        asked.append(count)
        return Lowered(TRIAL * count, 0, 6 * TRIAL)

    monkeypatch.setattr(stacking, "lower_train", lower_train)
    for name in ("lower_effective", "lower_evaluation"):
        monkeypatch.setattr(programs, name, lambda *_: Lowered(TRIAL // 10, 0, TRIAL))

    def fit(size: float, trials: int, at_once: int = 0) -> tuple[int, str, list[int]]:
        asked.clear()
        with Progress(interactive=False) as progress:
            found = stacking.fit(
                form(config(mesh={"memory_gb": size / 1e9})), trials, at_once, None, progress
            )
        return found.at_once, capsys.readouterr().out, list(asked)

    return fit


def test_all_are_tried_first(fit):
    at_once, said, asked = fit(9.5 * TRIAL, 5)
    assert (at_once, asked) == (5, [5])
    assert "would take" not in said


def test_the_most_that_fit_are_found(fit):
    at_once, said, asked = fit(4.5 * TRIAL, 12)
    assert at_once == 4
    assert "12 trials at once would take more than the compiler can place, and a device has 45.00 MB" in said
    assert "(mesh.memory_gb): 4 at once" in said
    assert len(asked) <= 1 + 5  # all, one, and by halves


def test_the_person_may_ask_for_fewer(fit):
    assert fit(4.5 * TRIAL, 12, at_once=2)[0] == 2
    assert fit(4.5 * TRIAL, 3, at_once=9)[0] == 3


def test_more_than_fit_are_refused_with_the_number_that_does(fit):
    with pytest.raises(
        InputError, match=r"(?s)sweep.at_once = 5: 5 trials at once would take 50.*sweep.at_once=4, the most"
    ) as refused:
        fit(4.5 * TRIAL, 12, at_once=5)
    assert str(refused.value).count("\n") == 1


@pytest.mark.parametrize("trials", [1, 8])
def test_not_even_one_fits(fit, trials):
    with pytest.raises(
        InputError, match=r"not even one trial fits: it takes 10.* has 5.00 MB .*\nWhat helps: "
    ):
        fit(0.5 * TRIAL, trials)


@pytest.mark.parametrize(
    ("count", "at_once", "sizes"), [(12, 8, [6, 6]), (8, 8, [8]), (7, 3, [3, 3, 1]), (3, 1, [1, 1, 1])]
)
def test_stacks_are_of_one_size_but_the_last(count, at_once, sizes):
    names = [str(i) for i in range(count)]
    waves = _waves(names, at_once)
    assert [len(wave) for wave in waves] == sizes
    assert [name for wave in waves for name in wave] == names
