"""What a person sees: the facts in a line, never a long silence, nothing that ends the run."""

import io
import re
import subprocess
import sys
import time

import pytest

from jaxlora.runs import progress as module
from jaxlora.runs.progress import Progress

FACTS = {"loss": 1.234, "nll": 1.23, "learning_rate": 2e-4, "tokens_per_second": 12345.4}


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def plain():
    with Progress(400, output=io.StringIO()) as progress:
        yield progress


def lines(progress: Progress) -> list[str]:
    return progress._output.getvalue().splitlines()


def test_a_logged_step_is_one_plain_line_with_the_time_left(plain, clock):
    plain.begin(0)
    clock.now += 60  # compiles
    for step in range(1, 51):
        plain.step(step)
        clock.now += 1
        if step % 10 == 0:
            plain.train(step, **FACTS)
    assert lines(plain)[-1] == "step  50/400  loss 1.234  nll 1.230  lr 2.0e-04  12,345 tokens/s  5:50 left"


def test_the_time_left_takes_the_median_of_steps_and_counts_evaluations(plain, clock):
    plain.begin(100)
    plain.train(110, **FACTS)
    assert "left" not in lines(plain)[-1]  # all that is known includes the compilation
    for step in (120, 130, 140, 150, 160):
        clock.now += 500 if step == 140 else 20  # one hiccup
        plain.train(step, **FACTS)
    assert lines(plain)[-1].endswith("8:00 left")  # 240 steps of 2 s
    plain.eval(0, 10)
    clock.now += 60
    plain.eval(10, 10)
    clock.now += 20
    plain.train(170, **FACTS)
    assert lines(plain)[-1].endswith("11:30 left")  # 230 steps of 2 s + 60 s an evaluation every 60 steps


def test_the_last_step_leaves_no_time(plain, clock):
    for step in (100, 200, 400):
        clock.now += 10
        plain.train(step, **FACTS)
    assert "left" in lines(plain)[1]
    assert "left" not in lines(plain)[2]


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (45.4, "0:45"), (201, "3:21"), (3723, "1:02:03"), (90061, "25:01:01")]
)
def test_durations(seconds, shown):
    assert module.duration(seconds) == shown


def test_numbers_that_are_not_finite_are_shown_as_such(plain):
    plain.train(1, loss=float("nan"), nll=float("inf"), learning_rate=0.0, tokens_per_second=float("nan"))
    assert lines(plain) == ["step   1/400  loss nan  nll inf  lr 0.0e+00  nan tokens/s"]


def test_a_short_stage_leaves_no_line_and_a_longer_one_its_time(plain, clock):
    with plain.stage("reading the config"):
        clock.now += 0.5
    with plain.stage("loading the base ..."):
        clock.now += 3.25
    with plain.stage("compiling"):
        clock.now += 83
    assert lines(plain) == ["loading the base: 3.2 s", "compiling: 1:23"]


def test_a_stage_that_fails_does_not_say_that_it_is_done(plain, clock):
    def fail() -> None:
        clock.now += 30
        raise OSError("no")

    with pytest.raises(OSError, match="no"), plain.stage("loading"):
        fail()
    assert lines(plain) == []


def test_nothing_lasts_longer_than_the_silence_allowed_without_a_line(monkeypatch):
    monkeypatch.setattr(module, "SILENCE", 0.3)
    with Progress(10, output=io.StringIO()) as progress:
        with progress.stage("loading the base") as stage:
            stage(30, 100)
            time.sleep(0.8)
        progress.begin(0)
        time.sleep(0.8)
        progress.step(1)
        progress.eval(1, 4)
        time.sleep(0.8)
        progress.eval(4, 4)
        said = lines(progress)
        progress.finish()
        time.sleep(0.8)
        assert lines(progress) == said  # nothing goes on: nothing to say
    assert "loading the base ... 30 %, 0 s" in said
    assert "step  0/10  ..." in said
    assert "evaluating ... 25 %, 0 s" in said


def test_tables_are_aligned(plain):
    plain.table("evaluations", [(1, 2.5, "first"), (100, 1.25)], header=("step", "eval/nll", ""))
    assert lines(plain) == ["evaluations", "  step  eval/nll", "  1     2.5       first", "  100   1.25"]


def test_a_reader_that_went_away_does_not_end_the_run():
    program = """
import sys, time
from jaxlora.runs.progress import Progress
with Progress(1000) as progress:
    for step in range(1000):
        progress.train(step, loss=1.0, nll=1.0, learning_rate=1e-4, tokens_per_second=1.0)
sys.stderr.write("went on to the end")
"""
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.stdout is not None
    assert run.stderr is not None
    with run:
        run.stdout.readline()
        run.stdout.close()
        assert run.stderr.read() == b"went on to the end"
    assert run.returncode == 0


def test_a_signal_handler_may_speak_in_the_middle_of_a_line():
    class Interrupted(io.StringIO):
        def write(self, text: str) -> int:
            if "first" in text:
                progress.say("second")
            return super().write(text)

    with Progress(output=Interrupted()) as progress:
        progress.say("first")
    assert lines(progress) == ["first", "second"]


def test_on_a_terminal_a_line_lives_below_the_messages():
    import os
    import pty

    program = """
import time
from jaxlora.runs.progress import Progress
with Progress(40) as progress:
    assert progress.interactive
    progress.table("model", [("base", "tiny")])
    with progress.stage("loading the base") as stage:
        stage(1, 2); time.sleep(1.1)
    progress.begin(0)
    for step in (10, 20):
        progress.step(step)
        progress.train(step, loss=1.5, nll=1.25, learning_rate=1e-4, tokens_per_second=1000.0)
        time.sleep(0.3)
    progress.say("[eval] better")
    progress.eval(1, 2); time.sleep(0.3)
"""
    terminal, end = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "NO_COLOR": "1"}
    with subprocess.Popen([sys.executable, "-c", program], stdout=end, stderr=end, env=environment) as run:
        os.close(end)
        seen = b""
        while True:
            try:
                seen += os.read(terminal, 10_000)
            except OSError:  # the program has ended
                break
    os.close(terminal)
    assert run.returncode == 0, seen
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    assert re.search(r"━+.*loading the base \.\.\.  50 %  1 s", text)
    assert "loading the base: 1." in text
    assert "step 20/40  loss 1.500  nll 1.250  lr 1.0e-04  1,000 tokens/s  0:0" in text
    assert "[eval] better" in text
    assert "evaluating ...  50 %" in text
    assert seen.count(b"\x1b[?25l") == seen.count(b"\x1b[?25h") > 0  # the cursor is given back
