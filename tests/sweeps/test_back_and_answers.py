"""In a stack where trials answer questions and one of them is rolled back, each still is the trial trained alone."""

import json
from pathlib import Path

import pytest

from jaxlora.config.build.trialing import alone
from jaxlora.train import fine_tune
from tests.sweeps.conftest import Swept, see_devices, trial
from tests.sweeps.test_equal import assert_same_adapters, assert_same_curves, read

pytestmark = pytest.mark.slow
# With this threshold a loss that is above the recent median at all is a spike.
BACK = {"guard__on_spike": "rollback", "guard__threshold": 1e-3, "guard__max_rollbacks": 2}
SHAPE = {
    "train__max_steps": 14,
    "checkpoint__every": 2,
    "eval__every": 4,
    "eval__generate": 4,
    "eval__max_new_tokens": 4,
}
TRIALS = {
    "back": {"optim__learning_rate": 5e-2, **BACK},
    "plain": {"optim__learning_rate": 1e-2},
    "other": {"optim__learning_rate": 3e-3, "lora__rank": 2, "seed": 3},
}


@pytest.fixture(scope="module")
def both(base_config, tmp_path_factory) -> tuple[Swept, Path]:
    folder = tmp_path_factory.mktemp("back")
    trials = [trial(base_config, name, **SHAPE, **changes) for name, changes in TRIALS.items()]
    with see_devices(1):
        swept = Swept(trials, folder / "sweep")
        for one in trials:
            assert fine_tune(alone(one.config), folder / "alone" / one.name, "tiny.py") == 0
    return swept, folder / "alone"


def test_one_goes_back_and_the_others_do_not_wait(both):
    swept, folder = both
    told, expected = (read(each / "back")["rollbacks"] for each in (swept.folder, folder))
    assert told == expected
    assert len(told) == 2
    for name in ("plain", "other"):
        assert not read(swept.folder / name).get("rollbacks")
        assert swept.board.steps[name] == sorted(swept.board.steps[name])


@pytest.mark.parametrize("name", TRIALS)
def test_curves_answers_and_adapters(both, name):
    swept, folder = both
    found, expected = swept.folder / name, folder / name
    one, other = read(found), read(expected)
    assert (one["status"], one["steps"]) == (other["status"], other["steps"])
    assert_same_curves(found, expected)
    answers = [file.name for file in (expected / "eval").glob("answers-*.jsonl")]
    assert answers
    for file in answers:
        texts = [
            [json.loads(line) for line in (run / "eval" / file).read_text().splitlines()]
            for run in (found, expected)
        ]
        assert texts[0] == texts[1]
    assert_same_adapters(found, expected)
