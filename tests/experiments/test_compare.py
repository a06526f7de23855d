"""Two runs side by side: every setting, every shared evaluation, every example."""

import pytest

from jaxlora.experiments import compare
from jaxlora.experiments.records import read_run
from tests.experiments.folders import write_run


def pair(tmp_path, **new):
    nll = {e: 1.5 + 0.01 * e for e in range(20)}
    better = {e: value - 0.2 if e < 15 else value + 0.1 for e, value in nll.items()}
    old = write_run(tmp_path / "old", evaluations={0: dict.fromkeys(nll, 2.0), 50: nll, 100: nll})
    new = write_run(
        tmp_path / "new", evaluations={0: dict.fromkeys(nll, 2.0), 100: better}, **{"texts": True, **new}
    )
    return read_run(old), read_run(new)


def test_examples_are_told_apart_by_what_became_of_them(tmp_path):
    old, new = pair(tmp_path)
    found = compare.examples(old, new)
    assert found is not None
    assert (len(found.better), len(found.worse), len(found.all)) == (15, 5, 20)
    assert (found.old_step, found.new_step) == (50, 100)
    assert found.better[0].change == pytest.approx(-0.2)
    assert found.worse[0].change == pytest.approx(0.1)
    assert [e.change for e in found.worse] == sorted((e.change for e in found.worse), reverse=True)
    one = found.better[0]
    assert (one.prompt, one.reference) == (f"question {one.example}", f"answer {one.example}")
    assert sum(e.change for e in found.all) == pytest.approx(15 * -0.2 + 5 * 0.1)


def test_the_judged_run_is_judged_against_the_other_whatever_its_own_baseline(tmp_path):
    old, new = pair(tmp_path, journal__baseline="another")
    first, second = compare.entries(old, new)
    assert (first.run, first.baseline) == (old, None)
    assert second.baseline is old
    (verdict,) = (finding for finding in second.verdict if finding.kind == "eval")
    assert verdict.numbers["difference"] == pytest.approx((15 * -0.2 + 5 * 0.1) / 20)


def test_other_eval_data_is_never_compared_by_example(tmp_path):
    old, new = pair(tmp_path, record={"data": {"eval": {"fingerprint": "0" * 32}}})
    assert compare.examples(old, new) is None
    (verdict,) = (f for f in compare.entries(old, new)[-1].verdict if f.kind == "eval")
    assert "unpaired, since other eval data" in verdict.text


def test_a_run_without_losses_by_example_has_none(tmp_path):
    old, new = pair(tmp_path)
    for file in (new.path / "eval").glob("eval-*"):
        file.unlink()
    assert compare.examples(old, new) is None


def test_settings_that_differ_or_that_one_alone_has(tmp_path):
    old, new = pair(tmp_path, optim__learning_rate=1e-4, journal__hypothesis="Slower is better.")
    assert compare.settings(old, new) == [("optim.learning_rate", 2e-4, 1e-4)]
    other = read_run(write_run(tmp_path / "b", optim__extra=3))
    assert ("optim.extra", None, 3) in compare.settings(old, other)


def test_curves_meet_at_the_steps_that_both_have(tmp_path):
    old, new = pair(tmp_path)
    assert [step for step, _, _ in compare.curve(old, new, "eval/nll")] == [0, 100]
    assert compare.curve(old, new, "eval/nll")[0] == (0, 2.0, 2.0)
    lines = compare.curve(old, new, "train/nll", most=5)
    assert [step for step, _, _ in lines] == [1, 26, 51, 75, 100]  # evenly, both ends among them


def test_curves_that_share_no_step_are_told_one_after_the_other(tmp_path):
    a = read_run(write_run(tmp_path / "a", evaluations={10: dict.fromkeys(range(3), 2.0)}))
    b = read_run(write_run(tmp_path / "b", evaluations={20: dict.fromkeys(range(3), 1.0)}))
    assert compare.curve(a, b, "eval/nll") == [(10, 2.0, None), (20, None, 1.0)]


def test_outcomes_leave_out_what_neither_knows(tmp_path):
    old, new = pair(tmp_path)
    told = {name: values for name, *values in compare.outcomes(old, new)}
    assert told["lowest eval nll"] == ["1.5950", "1.4700"]
    assert told["at step"] == ["50", "100"]
    bare = read_run(tmp_path)
    assert [name for name, *_ in compare.outcomes(bare, bare)] == ["steps"]
