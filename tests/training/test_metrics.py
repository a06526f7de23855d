"""Metrics from totals and from answers: by hand, and by the libraries called directly."""

import math
import re

import pytest
import sacrebleu
from rouge_score import rouge_scorer

from jaxlora.training import metrics
from jaxlora.training.metrics import ANSWER_METRICS, METRICS, Answered, Totals, better


def test_the_names_are_public():
    assert list(METRICS) == ["nll", "perplexity", "token_accuracy", "top5_accuracy", "entropy", "ece"]
    assert list(ANSWER_METRICS) == [
        "exact_match", "answer_match", "rouge_l", "bleu", "chrf", "answer_tokens", "ended"
    ]  # fmt: skip


def test_metrics_of_known_totals():
    totals = Totals(6.0, 3.0, 4.0, top5=3.5, entropy=2.0, confidences=(0.5, 1.5), hits=(1.0, 1.0))
    found = {name: metric(totals) for name, metric in METRICS.items()}
    assert found == {
        "nll": 1.5, "perplexity": pytest.approx(math.exp(1.5)), "token_accuracy": 0.75, "top5_accuracy": 0.875,
        "entropy": 0.5, "ece": (0.5 + 0.5) / 4,
    }  # fmt: skip


def test_perplexity_of_a_diverged_model_is_infinite_not_an_error():
    assert METRICS["perplexity"](Totals(nll=1e6, correct=0.0, weight=1.0)) == math.inf


REFERENCES = (
    "The cat sat on the mat.",
    "It is 7. #### 7",
    "one two three four five six",
    "She earns #### $1,200.",
)
TEXTS = ("the cat sat on a mat", "#### 8 no: #### 7.", "one two three four five seven", "#### 1200")


def answered(text=TEXTS, reference=REFERENCES, pattern=r"####\s*(\S+)"):
    count = len(text)
    return Answered(
        tuple(reference), tuple(text), tuple(range(1, count + 1)), (True,) * (count - 1) + (False,), pattern
    )


def test_overlap_is_what_the_libraries_say():
    found = {name: ANSWER_METRICS[name](answered()) for name in ("rouge_l", "bleu", "chrf")}
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    scores = [scorer.score(r, t)["rougeL"].fmeasure for r, t in zip(REFERENCES, TEXTS, strict=True)]
    assert found["rouge_l"] == pytest.approx(sum(scores) / 4, rel=1e-12)
    assert found["bleu"] == sacrebleu.BLEU().corpus_score(TEXTS, [REFERENCES]).score
    assert found["chrf"] == sacrebleu.CHRF().corpus_score(TEXTS, [REFERENCES]).score
    assert 0.3 < found["rouge_l"] < 0.9
    assert 20 < found["bleu"] < 90
    assert 20 < found["chrf"] < 90


def test_a_rouge_by_hand():
    """Longest common subsequence "the cat sat": precision 3/4, recall 3/3, F1 6/7."""
    assert ANSWER_METRICS["rouge_l"](answered(["the cat then sat"], ["The cat sat!"])) == pytest.approx(6 / 7)


@pytest.mark.parametrize("name", ["exact_match", "rouge_l", "bleu", "chrf"])
def test_the_reference_itself_is_the_best_answer_and_nothing_the_worst(name):
    best = 1 if name in ("exact_match", "rouge_l") else 100
    assert ANSWER_METRICS[name](answered(REFERENCES)) == pytest.approx(best)
    assert ANSWER_METRICS[name](answered(("",) * 4)) == 0


@pytest.mark.parametrize(
    ("text", "reference", "pattern", "expected"),
    [
        ("#### 7", "so #### 7", r"####\s*(\S+)", 1.0),
        ("#### 7 or #### 8", "#### 8", r"####\s*(\S+)", 1.0),  # the last one counts
        ("#### 8 or #### 7", "#### 8", r"####\s*(\S+)", 0.0),
        ("#### $1,200.", "#### 1200", r"####\s*(\S+)", 1.0),
        ("#### 12.5", "#### 125", r"####\s*(\S+)", 0.0),  # only a full stop at the end goes
        ("seven", "#### 7", r"####\s*(\S+)", 0.0),
        ("#### 7", "seven", r"####\s*(\S+)", None),  # nothing to compare with
        ("7 and 8", "8", r"\d+", 1.0),  # no group: all of the match
        ("x", "x", "(y)?", 1.0),  # a group that took no part is empty
        ("#### 7", "#### 7", "", None),
    ],
)
def test_answer_match(text, reference, pattern, expected):
    assert ANSWER_METRICS["answer_match"](answered([text], [reference], pattern)) == expected


def test_references_without_a_value_are_left_out():
    assert ANSWER_METRICS["answer_match"](answered()) == 1.0  # of two
    wrong = (*TEXTS[:3], "#### 12")
    assert ANSWER_METRICS["answer_match"](answered(wrong)) == 0.5


def test_lengths_and_ends():
    assert ANSWER_METRICS["answer_tokens"](answered()) == 2.5
    assert ANSWER_METRICS["ended"](answered()) == 0.75


LESS = {"nll", "perplexity", "entropy", "ece", "answer_tokens"}


@pytest.mark.parametrize(
    "name", [*METRICS, *ANSWER_METRICS, "eval_by_turn/later/ece", "eval_by_source/x/chrf"]
)
def test_which_is_better(name):
    less = name.rpartition("/")[2] in LESS
    assert better(name)(1.0, 2.0) is less
    assert better(name)(2.0, 1.0) is not less
    assert not better(name)(math.nan, 1.0)


def test_the_examples_in_the_docs_work(repository, monkeypatch):
    """As if they stood at the end of metrics.py."""
    monkeypatch.setattr(metrics, "METRICS", dict(METRICS))
    monkeypatch.setattr(metrics, "ANSWER_METRICS", dict(ANSWER_METRICS))
    text = (repository / "docs/evaluation.md").read_text()
    first, second = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for example in (first, second):
        exec(example, vars(metrics) | {"__name__": metrics.__name__})
    assert metrics.METRICS["bits"](Totals(6.0, 3.0, 4.0)) == pytest.approx(1.5 / math.log(2))
    assert metrics.ANSWER_METRICS["first_word"](answered()) == 0.25
    assert "bits" not in METRICS
