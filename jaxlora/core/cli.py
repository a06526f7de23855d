"""How every command ends: exit codes, and one clear line for wrong input."""

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jaxlora.core.errors import InputError
from jaxlora.core.imports import without_torch

EXIT_OK, EXIT_FAILED, EXIT_INPUT = 0, 1, 2
EXIT_INTERRUPTED = 130  # what shells give a command that SIGINT ended


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """Calls `main(argv)` and leaves with its exit code (None counts as 0).

    An `InputError` becomes `error: MESSAGE` on stderr and exit code 2; Ctrl-C, where a command does not take it for a
    request, exit code 130. Any other exception keeps its traceback and
    Python's exit code 1: it is a defect or a failing machine, and the traceback is what a report needs.
    """
    try:
        with without_torch():
            code = main(sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_INPUT)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(EXIT_OK if code is None else code)


@contextmanager
def leaving_on_request(
    say: Callable[[str], None], pass_on: Callable[[], None] = lambda: None
) -> Iterator[Callable[[], bool]]:
    """While open, SIGTERM and SIGINT ask the work to save and end; a second one ends it at once.

    Args:
        say: takes a line for the person. pass_on: tells others of the request.
    Returns:
        Whether there was a request.
    """
    received: list[int] = []

    def ask(number: int, _frame: Any) -> None:
        if received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        received.append(number)
        say(f"{signal.Signals(number).name}: saving after this step and leaving (once more: at once)")
        pass_on()

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
