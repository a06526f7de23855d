"""The command: what it prints and writes, and how it refuses."""

import csv
import io
import json
import re
import subprocess
import sys
import threading
import time

import pytest

from jaxlora import journal as command
from jaxlora.core.errors import InputError
from jaxlora.experiments import notes
from jaxlora.experiments.records import read_run
from jaxlora.runs.directory import RunDirectory
from tests.experiments.folders import CONFIG, write_run


@pytest.fixture
def runs(tmp_path):
    root = tmp_path / "runs"
    nll = {e: 1.4 + 0.01 * e for e in range(20)}
    write_run(root / "first", record={"started": 1.0})
    write_run(
        root / "second",
        evaluations={0: dict.fromkeys(nll, 2.0), 50: nll, 100: {e: value - 0.3 for e, value in nll.items()}},
        texts=True,
        record={"started": 2.0},
        optim__learning_rate=1e-4,
        journal__hypothesis="Slower is better.",
    )
    write_run(root / "sweep/trial-1", lora__rank=64, lora__alpha=128.0, record={"started": 3.0})
    return root


def say(argv, capsys) -> str:
    assert command.main([str(word) for word in argv]) in (0, None)
    return capsys.readouterr().out


# ---- the log ------------------------------------------------------------------------------------------------------


def test_the_log_is_by_model_and_rank(runs, capsys):
    told = say([runs], capsys).splitlines()
    assert told[0] == "Qwen2.5-0.5B-Instruct, rank 16"
    assert told[1].split() == ["first", "baseline"]
    at = next(i for i, line in enumerate(told) if line.startswith("  second"))
    assert told[at].split(maxsplit=1)[1] == "learning rate 1e-4 instead of 2e-4"
    assert told[at + 1].strip() == "hypothesis: Slower is better."
    assert any("eval nll better by 0.4" in line for line in told[at:])
    rank_64 = told.index("Qwen2.5-0.5B-Instruct, rank 64")
    assert told[rank_64 - 1] == ""
    assert told[rank_64 + 1].strip().startswith("trial-1")


def test_broken_runs_are_listed_with_what_is_wrong(runs, capsys):
    with (runs / "first/metrics.jsonl").open("ab") as stream:
        stream.write(b"not json\n")
    (runs / "second/record.json").unlink()
    (runs / "half").mkdir()
    (runs / "half/config.json").write_text(json.dumps(CONFIG)[:-20])
    (runs / "half/metrics.jsonl").write_text('{"step": 1, "train/n')
    told = say([runs], capsys)
    assert re.search(r"note: metrics.jsonl: 1 line could not be read \(line 10\d\)", told)
    assert "note: record.json: is missing" in told
    assert "note: config.json: is not valid JSON" in told
    assert all(name in told for name in ("first", "second", "half", "trial-1"))


@pytest.mark.parametrize("form", ["json", "csv", "markdown"])
def test_other_forms_go_to_standard_output_alone(runs, capsys, form):
    told = say([runs, f"--{form}"], capsys)
    if form == "json":
        assert [one["run"] for one in json.loads(told)] == ["first", "second", "trial-1"]
    elif form == "csv":
        assert [line["run"] for line in csv.DictReader(io.StringIO(told))] == ["first", "second", "trial-1"]
    else:
        assert told.startswith("## Qwen2.5-0.5B-Instruct, rank 16\n")


def test_report_and_pictures_are_written(runs, tmp_path, capsys):
    say([runs, "--html", tmp_path / "r.html", "--plot", tmp_path / "a/b"], capsys)
    assert "trial-1" in (tmp_path / "r.html").read_text(encoding="utf-8")
    assert (tmp_path / "a/b/nll-by-optim.learning_rate.png").is_file()


def test_a_terminal_gets_colours_and_whole_words(runs, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    told = say([runs], capsys)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", told)
    assert told != plain
    assert max(map(len, plain.splitlines())) <= 60
    assert "Slower is better." in plain


def test_jax_is_not_needed(runs):
    """A laptop without it, years later."""
    program = (
        "import sys\n"
        "from jaxlora.journal import main\n"
        f"main(['compare', {str(runs / 'first')!r}, {str(runs / 'second')!r}])\n"
        f"main([{str(runs)!r}, '--json'])\n"
        f"main(['note', {str(runs / 'first')!r}, 'seen'])\n"
        "slow = {'jax', 'jaxlib', 'flax', 'optax', 'orbax', 'transformers', 'tensorflow', 'torch'} & set(sys.modules)\n"
        "sys.exit(f'imported: {slow}' if slow else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- wrong input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{}/none"], "there is no .*none: give the folder"),
        (["{}/empty"], "no run in .*empty.\n.*config.json"),
        (["{}", "--format", "mlflow"], "--format mlflow: known are jaxlora, transformers"),
        (["{}", "--format", "csv"], r"no run in .*\n.*csv \(a .csv"),
        (["{}", "--html", "{}"], "--html .* is a folder"),
        (["{}", "--html", "{}/none/r.html"], "cannot be written in .*none"),
        (["{}", "--plot", "{}/file"], "--plot .*file is no folder"),
        (["{}", "--json", "--csv"], "not allowed with"),
        (["{}", "--watch", "--json"], "--watch goes on for ever"),
        (["{}", "--htm", "x"], "there is no option --htm: did you mean --html"),
        ([], "the following arguments are required: FOLDER"),
        (["compare", "{}/first"], "required: NEW"),
        (["compare", "{}", "{}/first"], r"holds 3 runs \(.*give the folder of one"),
        (["compare", "{}/first", "{}/second", "--examples", "-1"], "--examples -1: give 0 or more"),
        (["note", "{}/first", "  "], "the note is empty"),
        (["note", "{}/none", "x"], "there is no .*none"),
        (["note", "{}/curve.csv", "x"], "is a file, and notes are kept in folders"),
    ],
)
def test_wrong_input_is_refused_with_the_remedy(runs, words, message):
    (runs / "empty").mkdir()
    (runs / "file").write_text("")
    if "curve" in str(words):
        (runs / "curve.csv").write_text("step,loss\n1,2\n")
    with pytest.raises(InputError, match=f"(?s){message}"):
        command.main([word.format(runs) for word in words])


def test_a_baseline_that_does_not_exist_is_told(runs, capsys):
    write_run(runs / "third", journal__baseline="lost", record={"started": 9.0})
    assert "its baseline lost is not among these runs" in say([runs], capsys)


# ---- comparing ----------------------------------------------------------------------------------------------------


def test_two_runs_side_by_side(runs, tmp_path, capsys):
    told = say(
        ["compare", runs / "first", runs / "second", "--examples", "2", "--html", tmp_path / "c.html"], capsys
    )
    assert re.search(r"settings that differ\n +first +second\n +optim.learning_rate +2e-4 +1e-4\n", told)
    assert re.search(r"eval/nll\n +step +first +second +difference\n +0 +2.0950 +2.0000 +-0.0950\n", told)
    assert "eval nll better by" in told
    assert "by example: 20 of 20 are better than at step 100 of first, 0 worse (at step 100)" in told
    assert len(re.findall(r"question \d+ +answer \d+", told)) == 2
    assert (tmp_path / "c.html").is_file()


# ---- notes --------------------------------------------------------------------------------------------------------


def test_a_note_is_in_the_record_and_in_the_log(runs, capsys):
    assert say(["note", runs / "first", "too", "high  a rate"], capsys) == "noted: too high  a rate\n"
    say(["note", runs / "first", 'and "quoted", <b>'], capsys)
    record = json.loads((runs / "first/record.json").read_text())
    assert [note["text"] for note in record["notes"]] == ["too high a rate", 'and "quoted", <b>']
    assert record["status"] == "finished"
    told = say([runs], capsys)
    assert told.count("note: too high a rate") == 1
    (runs / "first/notes.jsonl").unlink()
    assert say([runs], capsys).count("note: too high a rate") == 1


def test_a_note_to_a_run_that_goes_on_survives_it(runs, capsys):
    with RunDirectory.open(runs / "first", CONFIG) as run:
        say(["note", runs / "first", "still going"], capsys)
        assert read_run(runs / "first").notes == ("still going",)
        run.update_record(status="running", steps=7)
        assert [note["text"] for note in run.record["notes"]] == ["still going"]
        run.update_record(status="finished")
    assert read_run(runs / "first").notes == ("still going",)
    assert "notes" in json.loads((runs / "first/record.json").read_text())


def test_a_note_to_a_run_without_a_record_makes_none(runs, capsys):
    (runs / "first/record.json").unlink()
    say(["note", runs / "first", "lost its record"], capsys)
    assert not (runs / "first/record.json").exists()
    assert read_run(runs / "first").notes == ("lost its record",)


def test_notes_of_many_at_once_are_all_kept(tmp_path):
    threads = [threading.Thread(target=notes.append, args=(tmp_path, f"note {n}")) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = [json.loads(line) for line in (tmp_path / "notes.jsonl").read_text().splitlines()]
    assert {line["text"] for line in lines} == {f"note {n}" for n in range(20)}


def test_a_note_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"cannot be written to .*notes\.jsonl"):
        notes.append(tmp_path / "gone", "x")


# ---- watching -----------------------------------------------------------------------------------------------------


def test_watch_tells_what_is_new_until_interrupted(runs, tmp_path, monkeypatch, capsys):
    looks = []

    def sleep(_: float) -> None:
        looks.append(time.monotonic())
        if len(looks) == 2:
            with RunDirectory.open(runs / "first", CONFIG) as run:
                run.append_metrics(101, {"train/nll": 0.25})
        if len(looks) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(command.time, "sleep", sleep)
    told = say([runs, "--watch", "--html", tmp_path / "r.html"], capsys)
    after = told[told.index("watching 3 runs") :]
    assert len(re.findall(r"\d\d:\d\d:\d\d  first +finished: step 101, train nll 0.25", after)) == 1
    assert len(re.findall(r"\d\d:\d\d:\d\d", after)) == 1  # the others have not gone on
    first, second = (tmp_path / "r.html").read_text(encoding="utf-8").split('"name":"second"')
    assert ",101]" in first
    assert ",101]" not in second
