"""Sides in processes of their own: each has its own memory, and they are timed in turn.

A child builds its side, warms it up and says so; then it does a round whenever it is told to, and says how long that
took. It speaks JSON, a line a message. What a library prints goes to standard error.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Side(NamedTuple):
    """What a child times.

    Attributes:
        run: does the steps of a round, waits for them, and returns how many useful tokens they had.
        device_peak: bytes of device memory at their highest; None where the device's memory is the host's.
        facts: what it ran with, for the report.
    """

    run: Callable[[], int]
    device_peak: Callable[[], int | None]
    facts: dict[str, Any]


class SideError(Exception):
    """A side that could not be built or run, with the reason in a line."""


class Child:
    """The parent's end.

    Args:
        module: what the child runs as `python -m`. job: what it is told.
    Attributes:
        facts: what the child said when it was ready.
    Raises:
        SideError: it could not get ready.
    """

    def __init__(self, module: str, job: dict[str, Any]):
        # Both sides of a GPU are there at once, and its memory is counted: nothing is taken in advance.
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.facts = self._answer()

    def run(self) -> dict[str, Any]:
        """One round: its `seconds` and `tokens`."""
        self._tell("run")
        return self._answer()

    def end(self) -> dict[str, Any]:
        """Ends it; the bytes of its `peak` while it was timed, and since it began (`peak_whole`)."""
        self._tell("end")
        answer = self._answer()
        self.kill()  # torch takes its time to end by itself after a compilation
        return answer

    def kill(self) -> None:
        """Ends one that is in the way."""
        self._process.kill()
        self._wait()

    def _wait(self) -> int:
        """Its exit code, once it has ended."""
        # Leaving it closes the pipes; an order may be left in one.
        with contextlib.suppress(BrokenPipeError), self._process:
            pass
        return self._process.wait()

    def _tell(self, order: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(order + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise SideError(f"the process ended with code {self._wait()}") from None

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SideError(f"the process ended with code {self._wait()}")
        answer = json.loads(line)
        if "failed" in answer:
            self._wait()
            raise SideError(answer["failed"])
        return answer


def serve(build: Callable[[dict[str, Any]], Side]) -> None:
    """The child's end: builds what `sys.argv[1]` asks for, and obeys."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed

    def answer(**message: Any) -> None:
        print(json.dumps(message), file=answers, flush=True)

    try:
        side = build(json.loads(sys.argv[1]))
        side.run()  # compiles, and fills every pool of memory
        before = _host_peak()
        _forget_host_peak()
        answer(**side.facts)
        for order in sys.stdin:
            if order.strip() == "end":
                device, host = side.device_peak(), _host_peak()
                answer(
                    peak=host if device is None else device,
                    peak_whole=max(before, host) if device is None else device,
                )
                return
            began = time.perf_counter()
            tokens = side.run()
            answer(seconds=time.perf_counter() - began, tokens=tokens)
    except Exception as error:  # the parent goes on with the other sides, and says why this one is missing
        text = str(error).strip().splitlines() or [""]
        answer(failed=f"{type(error).__name__}: {text[0]}"[:200])


def _host_peak() -> int:
    """Bytes of this process's resident memory at their highest."""
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if sys.platform == "darwin" else 1024 * used
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return 1024 * int(lines["VmHWM"].split()[0])


def _forget_host_peak() -> None:
    """Lets Linux count anew from what is resident now; elsewhere the peak stays that of the whole process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
