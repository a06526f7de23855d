"""The report is one file that needs nothing else, says what the log says, and works in a browser."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from jaxlora.experiments.imports.find import read_all
from jaxlora.experiments.log import journal
from jaxlora.experiments.plots import MOST, by_setting, learning_curves, write_plots
from jaxlora.experiments.report import COARSEST, FEW, METRICS, to_html, write_report
from jaxlora.experiments.telling import groups, lines
from tests.experiments.folders import write_run

SPIKE = {step: 1 + 20 / (20 + step) + 0.01 * (step % 3) for step in range(1, 201)} | {120: 9.0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    nll = {e: 1.4 + 0.01 * e for e in range(20)}
    write_run(root / "first", record={"started": 1.0})
    write_run(
        root / "second <b>",
        evaluations={0: dict.fromkeys(nll, 2.0), 50: nll, 100: {e: value - 0.1 for e, value in nll.items()}},
        texts=True,
        record={"started": 2.0},
        optim__learning_rate=1e-4,
        journal__baseline="first",
        journal__hypothesis="</script><b>Is 1 < 2 & 'so'?",
    )
    write_run(root / "spiky", train=SPIKE, record={"started": 3.0}, lora__rank=64, lora__alpha=128.0)
    write_run(root / "bare", train={}, evaluations={}, record={"started": 4.0})
    write_run(
        root / "lost", train={1: float("nan"), 2: float("inf")}, evaluations={}, record={"started": 5.0}
    )
    (root / "half").mkdir()
    (root / "half/record.json").write_text('{"status": ')
    return root


@pytest.fixture(scope="module")
def entries(runs):
    return journal(read_all([runs]))


@pytest.fixture(scope="module")
def text(entries) -> str:
    return to_html(entries, "Tests & <runs>", made="")


class Outline(HTMLParser):
    """Tags with their attributes, and the visible text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._hidden = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._hidden = tag in ("script", "style")

    def handle_endtag(self, tag):
        self._hidden = False

    def handle_data(self, data):
        if not self._hidden:
            self.words.append(data)


def payload(text: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found is not None
    return json.loads(found[1])


def test_it_needs_nothing_from_elsewhere(text):
    outline = Outline(text)
    for _, attributes in outline.tags:
        for name in ("src", "href", "srcset", "data", "action"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "default-src 'none'" in text
    assert "@import" not in text
    assert "url(" not in text


def test_it_says_what_the_log_says_without_javascript(text, entries):
    words = "".join(Outline(text).words)
    for entry in entries:
        assert entry.run.name in words
        for line in lines(entry):
            assert line.text in words
    for group in groups(entries):
        assert group.title in words


def test_texts_of_others_are_never_markup(text):
    assert "<b>" not in text
    assert html.escape("second <b>") in text
    assert "Tests &amp; &lt;runs&gt;" in text


def test_its_data_are_the_runs_own(text, entries):
    data = payload(text)
    by_name = {run["name"]: run for run in data["runs"]}
    steps, values = by_name["first"]["curves"]["eval/nll"]
    assert steps == [0, 50, 100]
    assert values == pytest.approx([2.095, 1.695, 1.595])
    second = by_name["second <b>"]
    assert data["runs"][second["baseline"]]["name"] == "first"
    assert second["best"] == 100
    assert second["examples"]["better"][0]["prompt"].startswith("question ")
    assert second["config"]["optim.learning_rate"] == 1e-4
    assert by_name["spiky"]["spikes"] == [120]
    assert by_name["lost"]["curves"]["train/nll"][1] == [
        None,
        None,
    ]  # not finite: it has no place in a picture
    assert by_name["half"]["curves"] == {}
    assert set(data["swept"]) == {"optim.learning_rate", "lora.rank"}


def test_of_many_runs_the_shape_is_kept(tmp_path):
    """Thinned curves keep their lowest and highest points, and the file stays small."""
    draw = np.random.default_rng(0)
    for number in range(FEW + 1):
        nll = 1 + np.exp(-np.arange(2000) / 300) + 0.02 * draw.normal(size=2000)
        nll[700 + number] = 8.0
        write_run(tmp_path / f"run-{number}", train=dict(enumerate(nll.tolist(), 1)), evaluations={})
    text = to_html(journal(read_all([tmp_path])))
    for number, run in enumerate(sorted(payload(text)["runs"], key=lambda run: int(run["name"][4:]))):
        steps, values = run["curves"]["train/nll"]
        assert COARSEST <= len(steps) < 2000
        assert (steps[0], steps[-1]) == (1, 2000)
        assert max(values) == 8.0
        assert steps[values.index(8.0)] == 701 + number
    assert set(payload(text)["metrics"]) <= set(METRICS)


def test_a_report_is_replaced_whole(tmp_path, entries):
    file = tmp_path / "report.html"
    file.write_text("old")
    write_report(file, entries, made="")
    assert file.read_text(encoding="utf-8").endswith("</html>")
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_it_works_in_a_browser(tmp_path, text):
    """What the scripts have made, in a window as narrow as a phone's: rows, charts, and no error."""
    assert CHROMIUM is not None
    file = tmp_path / "report.html"
    watch = '<script>addEventListener("error", (e) => document.body.setAttribute("data-error", e.message))</script>'
    file.write_text(text.replace("<body>", f"<body>{watch}"), encoding="utf-8")
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=390,800", "--dump-dom", f"{file.as_uri()}#run-1",
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    body = shown[shown.index("<body") :]
    outline = Outline(body)
    assert "data-error" not in body.split(">", 1)[0]
    charts = body.count('role="img"')  # each a picture that says what it shows
    assert charts == 4  # curves, settings, and two of the run that is open
    assert body.count('aria-label="eval/nll by step"') == 2
    table = body[body.index('<section id="table">') :]
    table = table[table.index("<tbody>") : table.index("</tbody>")]
    assert table.count("<tr") == 6
    assert "Held-out examples that got better than with first" in "".join(outline.words)


# ---- pictures -----------------------------------------------------------------------------------------------------


def test_learning_curves_show_train_and_eval_with_best_and_spikes(entries):
    pictures = {group.title: learning_curves(group) for group in groups(entries)}
    (rank_64,) = (figure for title, figure in pictures.items() if title.endswith("rank 64"))
    assert rank_64 is not None
    left, right = rank_64.axes
    (curve, spike), (evaluated, best) = left.lines, right.lines
    assert curve.get_ydata().tolist() == list(SPIKE.values())
    assert (spike.get_xdata()[0], spike.get_ydata()[0]) == (120, 9.0)
    assert evaluated.get_xdata().tolist() == [0, 50, 100]
    assert best.get_xdata()[0] == 100


def test_a_setting_is_drawn_against_the_lowest_eval_nll(entries):
    figure = by_setting(entries, "optim.learning_rate")
    assert figure is not None
    points = {
        tuple(p) for line in figure.axes[0].lines for p in np.transpose(line.get_data()).round(4).tolist()
    }
    assert points == {(2e-4, 1.595), (1e-4, 1.395)}
    assert by_setting(entries, "seed") is None


def test_of_too_many_runs_the_best_are_drawn(tmp_path):
    for number in range(MOST + 5):
        write_run(
            tmp_path / f"{number}",
            train={1: 1.0, 2: 0.5},
            evaluations={2: dict.fromkeys(range(3), 1.0 + number)},
        )
    (group,) = groups(journal(read_all([tmp_path])))
    figure = learning_curves(group)
    assert figure is not None
    names = {line.get_label() for line in figure.axes[1].lines} - {"_child1"}
    assert {str(n) for n in range(MOST)} <= names
    assert str(MOST) not in names
    assert figure.get_suptitle().endswith("(5 runs not shown)")


def test_pictures_are_files_named_after_what_they_show(tmp_path, entries):
    files = write_plots(tmp_path / "plots", entries)
    assert {file.name for file in files} == {
        "curves-Qwen2.5-0.5B-Instruct-rank-16.png", "curves-Qwen2.5-0.5B-Instruct-rank-64.png",
        "nll-by-optim.learning_rate.png", "nll-by-lora.rank.png",
    }  # fmt: skip
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
