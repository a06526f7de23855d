"""What is told of entries, for people and for other tools: the same facts, in every form."""

import csv
import io
import json

import pytest

from jaxlora.experiments import telling
from jaxlora.experiments.following import News, Reader, state
from jaxlora.experiments.imports.find import read_all
from jaxlora.experiments.log import journal
from jaxlora.experiments.records import read_run
from jaxlora.runs.directory import RunDirectory
from tests.experiments.folders import CONFIG, write_run


@pytest.fixture
def entries(tmp_path):
    write_run(tmp_path / "first", record={"started": 1.0})
    write_run(
        tmp_path / "se|co*nd",
        record={"started": 2.0},
        optim__learning_rate=1e-4,
        journal__hypothesis="A <gentler> rate.",
    )
    write_run(tmp_path / "wide", record={"started": 3.0}, lora__rank=64, lora__alpha=128.0)
    write_run(tmp_path / "bare", train={}, evaluations={}, record={"started": 4.0})
    return journal(read_all([tmp_path]))


def test_groups_are_by_model_and_rank(entries):
    found = telling.groups(entries)
    assert [(group.title, [e.run.name for e in group.entries]) for group in found] == [
        ("Qwen2.5-0.5B-Instruct, rank 16", ["first", "se|co*nd", "bare"]),
        ("Qwen2.5-0.5B-Instruct, rank 64", ["wide"]),
    ]


def test_lines_tell_what_changed_why_and_what_came_of_it(entries):
    told = [line.text for line in telling.lines(entries[1])]
    assert told[:2] == ["learning rate 1e-4 instead of 2e-4", "hypothesis: A <gentler> rate."]
    assert set(told[2:]) >= {finding.text for finding in entries[1].verdict}
    assert next(telling.lines(entries[0])).text == "baseline"


def test_the_table_has_the_numbers_of_the_curves(entries):
    row = telling.row(entries[0])
    assert (row["run"], row["rank"], row["learning_rate"], row["status"]) == ("first", 16, 2e-4, "finished")
    assert row["best_step"] == 100
    assert row["best_eval_nll"] == pytest.approx(1.5 + 0.01 * 9.5)
    assert row["last_train_nll"] == pytest.approx(1 + 20 / 120)
    bare = telling.row(entries[2])
    assert bare["best_eval_nll"] is bare["best_step"] is bare["last_train_nll"] is None


def test_json_and_csv_carry_the_same(entries):
    told = json.loads(telling.to_json(entries))
    lines = list(csv.DictReader(io.StringIO(telling.to_csv(entries))))
    assert (
        [one["run"] for one in told]
        == [line["run"] for line in lines]
        == ["first", "se|co*nd", "bare", "wide"]
    )
    for one, line, entry in zip(told, lines, entries, strict=True):
        assert one["config"]["optim.learning_rate"] == float(line["learning_rate"])
        assert [f["text"] for f in one["verdict"]] == [f.text for f in entry.verdict]
        assert line["verdict"] == "; ".join(f.text for f in entry.verdict)
        assert (one["best_eval_nll"] is None) == (line["best_eval_nll"] == "")


def test_markdown_shows_texts_as_they_are(entries):
    text = telling.to_markdown(entries)
    assert text.startswith(
        "## Qwen2.5-0.5B-Instruct, rank 16\n\n| run | what was changed | what came of it |\n| --- |"
    )
    (line,) = (line for line in text.splitlines() if "gentler" in line)
    assert line.startswith(
        r"| se\|co\*nd | learning rate 1e-4 instead of 2e-4<br>hypothesis: A &lt;gentler> rate. |"
    )
    assert line.replace(r"\|", "").count("|") == 4


def test_swept_settings_are_those_that_train(tmp_path):
    write_run(tmp_path / "a", eval__every=5, lora__rank=8, lora__alpha=16.0)
    write_run(tmp_path / "b", eval__every=10, lora__rank=16, lora__alpha=32.0, optim__learning_rate=1e-4)
    write_run(tmp_path / "c", eval__every=10, lora__rank=32, lora__alpha=64.0)
    runs = read_all([tmp_path])
    assert telling.swept(runs) == ["lora.rank", "optim.learning_rate"]  # alpha only follows the rank
    write_run(tmp_path / "e", model__path="another", train__batch_size=512)
    assert telling.swept(read_all([tmp_path])) == [
        "lora.rank",
        "optim.learning_rate",
    ]  # another model is no sweep
    write_run(tmp_path / "d", eval__every=10, lora__rank=32, lora__alpha=32.0)
    assert "lora.alpha" in telling.swept(read_all([tmp_path]))


# ---- following ----------------------------------------------------------------------------------------------------


def test_a_folder_that_has_not_changed_is_not_read_again(tmp_path):
    write_run(tmp_path / "a")
    read = []
    reader = Reader(lambda folder: (read.append(folder.name), read_run(folder))[1])
    first = reader(tmp_path / "a")
    assert reader(tmp_path / "a") is first
    with RunDirectory.open(tmp_path / "a", CONFIG) as run:
        run.append_metrics(101, {"train/nll": 0.5})
    assert reader(tmp_path / "a").steps == 101
    assert read == ["a", "a"]


def test_news_are_what_was_not_told_before(tmp_path):
    write_run(
        tmp_path / "a", train={1: 2.0, 2: 1.9}, evaluations={}, record={"status": "running", "steps": 2}
    )
    reader, news = Reader(), News()
    assert news(journal(read_all([tmp_path], read=reader))) == []
    assert news(journal(read_all([tmp_path], read=reader))) == []
    with RunDirectory.open(tmp_path / "a", CONFIG) as run:
        run.append_metrics(3, {"train/nll": 1.8})
    write_run(tmp_path / "b", train={1: 2.0}, evaluations={})
    (name, lines), (other, others) = news(journal(read_all([tmp_path], read=reader)))
    assert (name, lines[0]) == ("a", "running: step 3, train nll 1.80")
    assert other == "b"
    assert others[-1] == "finished: step 1, train nll 2.00"


def test_state_says_where_a_run_is(tmp_path):
    evaluations = {2: dict.fromkeys(range(3), 1.5), 4: dict.fromkeys(range(3), 1.75)}
    train = {step: 3.0 - step / 4 for step in range(1, 5)}
    folder = write_run(
        tmp_path / "a",
        train=train,
        evaluations=evaluations,
        record={"status": "running"},
        train__max_steps=1000,
    )
    assert state(read_run(folder)) == (
        "running: step 4 of 1,000, train nll 2.00, eval nll 1.75 (lowest 1.50 at step 2)"
    )
