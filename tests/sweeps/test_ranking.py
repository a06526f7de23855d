"""The ranking of a sweep, and what is said about the next one."""

import numpy as np
import pytest

from jaxlora.config.schema import Config
from jaxlora.runs.directory import RunDirectory
from jaxlora.sweeps.ledger import Ledger
from jaxlora.sweeps.ranking import advice, ranking
from jaxlora.sweeps.trials import Trial

CONFIG = Config.from_dict({"model": {"path": "m"}, "data": {"train": "d"}})
EXAMPLES = 30


@pytest.fixture
def trained(tmp_path):
    """Writes a trial's folder; returns the trial. `curve`: step -> eval/nll; examples differ by much more."""

    def trained(name, curve, status="finished", fingerprint="f", noise=1e-4, tokens=4, steps=20, **changes):
        trial = Trial(name, {key.replace("__", "."): value for key, value in changes.items()}, CONFIG)
        with RunDirectory.open(tmp_path / name, {"name": name}) as run:
            hard = np.random.default_rng(0).normal(0, 1, EXAMPLES)
            for step, nll in curve.items():
                own = np.random.default_rng([step, len(name), ord(name[-1])]).normal(0, noise, EXAMPLES)
                columns = {"example": range(EXAMPLES), "nll": nll + hard - hard.mean() + own - own.mean()}
                run.write_evaluation(step, columns | {"tokens": [tokens] * EXAMPLES})
                run.append_metrics(step, {"eval/nll": nll})
            best = min(curve, key=lambda step: curve[step]) if curve else None
            run.update_record(
                status=status,
                steps=steps,
                best={"step": best, "eval/nll": curve[best]} if best is not None else None,
                data={"eval": {"fingerprint": fingerprint}},
            )
        return trial

    return trained


def names(places):
    return [place.trial.name for place in places]


def test_the_best_nll_comes_first_and_none_last(trained, tmp_path):
    trials = [
        trained("b", {10: 1.5, 20: 1.4}),
        trained("nothing", {}, status="diverged"),
        trained("a", {10: 1.2, 20: 1.3}),
        Trial("waiting", {}, CONFIG),
    ]
    places = ranking(tmp_path, trials)
    assert names(places) == ["a", "b", "nothing", "waiting"]
    assert [place.step for place in places] == [10, 20, 0, 0]
    assert places[0].behind is None
    assert places[3].record == {}


def test_the_interval_is_of_paired_examples(trained, tmp_path):
    """Examples that differ by 1 from each other hide no difference of 0.01: only what is each trial's own counts."""
    trials = [trained("a", {20: 1.2}), trained("b", {20: 1.21}), trained("c", {20: 1.2001}, noise=1e-2)]
    _, c, b = ranking(tmp_path, trials)
    assert (c.trial.name, b.trial.name) == ("c", "b")
    assert b.behind is not None
    assert b.behind.mean == pytest.approx(0.01, rel=1e-6)
    assert b.behind.standard_error < 1e-4
    assert not b.tied
    assert c.tied


def test_a_dropped_trial_is_ranked_by_what_it_was_dropped_on(trained, tmp_path):
    """Its own calendar's last evaluation came before it had learnt much."""
    trials = [trained("a", {10: 1.9, 20: 1.2}), trained("b", {10: 2.0}), trained("c", {10: 1.8})]
    columns = {"example": [*range(EXAMPLES)], "nll": [1.5] * EXAMPLES, "tokens": [4] * EXAMPLES}
    Ledger(tmp_path).keep_judged("b", 15, columns)
    Ledger(tmp_path).keep_judged(
        "c", 15, columns | {"nll": [None, *[1.5] * (EXAMPLES - 1)]}
    )  # not finite: no better
    _, b, c = ranking(tmp_path, trials)
    assert (b.trial.name, b.step, b.nll) == ("b", 15, 1.5)
    assert b.behind is not None
    assert b.behind.mean == pytest.approx(0.3)
    assert (c.trial.name, c.step, c.nll) == ("c", 10, 1.8)


@pytest.mark.parametrize("changed", [{"fingerprint": "g"}, {"tokens": 5}])
def test_other_examples_are_not_compared(trained, tmp_path, changed):
    places = ranking(tmp_path, [trained("a", {20: 1.2}), trained("b", {20: 1.3}, **changed)])
    assert places[1].behind is None
    assert not places[1].tied


def rates(trained, best, values=(1e-4, 2e-4, 4e-4)):
    return [
        trained(f"r{value}", {10: 1.5, 20: 1.4 if value != best else 1.3}, optim__learning_rate=value)
        for value in values
    ]


@pytest.mark.parametrize(
    ("best", "said"),
    [
        (1e-4, "optim.learning_rate: the best, 0.0001, is the lowest that was tried: widen it, for example with 5e-05"),
        (4e-4, "optim.learning_rate: the best, 0.0004, is the highest that was tried: widen it, for"),
        (2e-4, "optim.learning_rate: the best, 0.0002, lies inside what was tried; between 0.0001 and 0.0004"),
    ],
)  # fmt: skip
def test_an_optimum_at_the_edge_says_to_widen_it(trained, tmp_path, best, said):
    found = advice(ranking(tmp_path, rates(trained, best)))
    assert [line for line in found if line.startswith(said)]


def test_two_values_have_no_inside(trained, tmp_path):
    found = advice(ranking(tmp_path, rates(trained, 1e-4, values=(1e-4, 2e-4))))
    assert not [line for line in found if line.startswith("optim.learning_rate")]


def test_a_rank_is_widened_to_a_whole_number(trained, tmp_path):
    trials = [trained(f"k{rank}", {20: 2 - rank / 100}, lora__rank=rank) for rank in (8, 16, 32)]
    assert "for example with 64" in advice(ranking(tmp_path, trials))[0]


def test_ties_are_named(trained, tmp_path):
    trials = [trained("a", {20: 1.2}), trained("b", {20: 1.2001}, noise=1e-2), trained("c", {20: 1.5})]
    (said,) = [line for line in advice(ranking(tmp_path, trials)) if "not to be told" in line]
    assert said.startswith("not to be told from the best: b (some ")


@pytest.mark.parametrize(
    ("curve", "said"),
    [
        ({10: 1.4, 20: 1.3}, "the best was still getting better at its last step, 20"),
        ({5: 1.2, 10: 1.3, 20: 1.4}, "the best was at its best at step 5 of 20: a shorter run will do"),
        ({10: 1.30001, 20: 1.3}, None),  # within chance
        ({15: 1.2, 20: 1.3}, None),
    ],
)
def test_the_length_is_judged(trained, tmp_path, curve, said):
    noise = 1e-2 if said is None else 1e-4
    found = advice(ranking(tmp_path, [trained("a", curve, noise=noise), trained("b", {20: 2.0})]))
    assert [line[: len(said or "")] for line in found] == ([said] if said else [])


def test_nothing_finite_has_an_advice_too(trained, tmp_path):
    assert "lower the learning rate" in advice(ranking(tmp_path, [trained("a", {}, status="diverged")]))[0]


def test_a_damaged_evaluation_does_not_end_the_ranking(trained, tmp_path):
    trials = [trained("a", {20: 1.2}), trained("b", {20: 1.3})]
    (tmp_path / "b/eval/eval-00000020.jsonl").write_text("{")
    assert names(ranking(tmp_path, trials)) == ["a", "b"]
    assert ranking(tmp_path, trials)[1].behind is None
