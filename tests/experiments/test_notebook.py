"""Row by row: the journal says of eighteen runs what was once written down about them by hand."""

import re

import pytest

from configs.notebook import RUNS
from tests.experiments.invented import NOTEBOOK
from tests.experiments.notebook import WRITTEN, entries, page

# Name -> by kind of finding what it must say ("advice" and "changes" too); "-kind": it must not speak of that.
EXPECTED = {
    "Nov22_10-57": {"level": "train nll 0.71", "plateau": "stays near 1.51", "-overfitting": ""},
    "Nov22_14-28": {
        "changes": "learning rate 1e-4 instead of 2e-4; 1000 warmup steps instead of 2200; shuffled data",
        "convergence": "slightly slower",
        "eval": "no difference in eval nll",
    },
    "Nov22_18-58": {
        "changes": "batch 64 instead of 128",
        "convergence": "converges slower",
        "eval": "no difference",
    },
    "Nov22_21-31": {
        "changes": "weight decay 0.1 instead of 0.01; label smoothing 0.1 instead of 0",
        "convergence": "much slower",
        "eval": "worse by 0.31",
        "advice": "go back to label smoothing 0",
    },
    "Nov22_22-20": {
        "alike": "like that of Nov22_18-58",
        "eval": "no difference",
        "advice": r"weight decay 0.1 shrinks A and B by 8.6% over the run, too little to matter",
    },
    "Nov23_15-59": {"eval": "no difference"},
    "Nov23_19-53": {"spike": "loss spike at step 4,096", "-steady": ""},
    "Nov23_21-37": {
        "convergence": "much slower",
        "steady": "trains steadily",
        "undertrained": "still falling",
        "advice": "train longer",
    },
    "Nov23_23-30": {"convergence": "converges slower", "hypothesis": "A learning rate in between is better."},
    "Nov24_23-30": {"convergence": "converges faster", "risk": "risks diverging", "-divergence": ""},
    "Nov25_09-19": {"convergence": "converges slower", "eval": "worse by 0.0[67]"},
    "Nov25_12-25": {
        "steady": "trains steadily",
        "convergence": "as fast as",
        "changes": "rank 16 instead of 128",
        "advice": "rank and learning rate changed together",
    },
    "Nov22_23-06": {
        "level": "train nll 0.86.*, eval nll 1.20",
        "steady": "trains steadily",
        "advice": "fewer epochs are enough: best/ is of step 4,500; evaluations nearer together",
    },
    "Nov23_08-13": {
        "level": "train nll 0.667, eval nll 1.20",
        "eval": "no difference",
        "advice": "rank 128 is no better than 16",
    },
    "Nov24_02-27": {"convergence": "converges slower", "steady": "trains steadily"},
    "Nov24_22-17": {
        "divergence": "diverges at step 2,0",
        "-convergence": "",
        "advice": "a learning rate of 2.5e-4",
    },
    "Nov24_10-49": {"steady": "trains steadily", "-overfitting": "", "-undertrained": ""},
    "Nov25_02-30": {
        "convergence": "faster",
        "early_stop": "stops very early, at step 1,500 of 9,000, inside the warmup",
        "advice": "let no run stop before its learning rate has been reached",
    },
}


@pytest.fixture(scope="module")
def found():
    return entries()


def test_every_run_of_the_notebook_is_there():
    assert EXPECTED.keys() == RUNS.keys() == NOTEBOOK.keys() == WRITTEN.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_the_journal_says_what_was_written_down(found, name):
    entry = next(entry for entry in found if entry.run.name == name)
    said = {finding.kind: finding.text for finding in entry.verdict} | {
        "advice": entry.advice,
        "changes": "; ".join(entry.changes),
        "hypothesis": entry.hypothesis,
    }
    for kind, words in EXPECTED[name].items():
        if kind.startswith("-"):
            assert kind[1:] not in said
        else:
            assert re.search(words, said.get(kind, "")), (kind, said)


def test_by_model_and_rank_in_order(found):
    order = [
        (entry.run.config["model.path"].rpartition("/")[2], entry.run.config["lora.rank"]) for entry in found
    ]
    assert list(dict.fromkeys(order)) == [
        ("Qwen2.5-0.5B-Instruct", 128),
        ("Qwen2.5-0.5B-Instruct", 16),
        ("Qwen2.5-7B-Instruct", 16),
        ("Qwen2.5-7B-Instruct", 128),
        ("Mistral-7B-Instruct-v0.3", 128),
    ]
    assert order == sorted(order, key=list(dict.fromkeys(order)).index)


def test_the_page_in_docs_is_what_the_journal_says(found, repository):
    assert (repository / "docs" / "journal-notebook.md").read_text() == page(found)
