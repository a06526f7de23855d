"""launch/supervise.sh: a command goes on after a crash, a bounded number of times."""

import signal

import pytest

SCRIPT = "supervise.sh"


def supervise(stage, restarts: int, command: str):
    """What was printed, the exit code, and how often the command ran."""
    counted = f"echo run >>{stage.folder}/runs; {command}"
    done = stage.run(SCRIPT, stage.folder / "starts", str(restarts), "10", "bash", "-c", counted)
    return done.stdout, done.returncode, (stage.folder / "runs").read_text().count("run\n")


def test_a_crash_is_gone_on_after(stage):
    told, code, runs = supervise(stage, 3, f"(($(wc -l <{stage.folder}/runs) == 3)) || exit 1")
    assert (code, runs) == (0, 3)
    assert "exit code 1\n== again in 10 s (restart 1 of 3)" in told
    assert [call.arguments for call in stage.calls("sleep")] == [("10",), ("20",)]
    assert not (stage.folder / "starts").exists()


def test_a_bounded_number_of_times_and_reboots_count(stage):
    told, code, runs = supervise(stage, 2, "exit 1")
    assert (code, runs) == (1, 3)
    assert "started 3 times, and 2 restarts are allowed: not started again" in told
    _, code, runs = supervise(stage, 2, "exit 1; the machine was rebooted")
    assert (code, runs) == (1, 3)


@pytest.mark.parametrize("code", [0, 2])
def test_an_end_and_wrong_input_are_not_gone_on_after(stage, code):
    assert supervise(stage, 3, f"exit {code}")[1:] == (code, 1)


def test_a_request_to_leave_is_handed_on_once(stage):
    """A second SIGTERM would make training leave without saving."""
    log = stage.folder / "log"
    wait = f"until grep -q asked {log}; do /bin/sleep 0.05; done"
    command = f"trap 'echo asked >>{log}' TERM; echo began >>{log}; {wait}; exit 1"
    with stage.start(SCRIPT, stage.folder / "starts", "3", "10", "bash", "-c", command) as process:
        stage.wait_for(log, "began")
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 1
    assert log.read_text() == "began\nasked\n"
    assert "again" not in stage.output.read_text()
