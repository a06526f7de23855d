"""How every command ends: exit codes, and one clear line for wrong input."""

import sys
from collections.abc import Callable, Sequence

from jaxlora.core.errors import InputError

EXIT_OK, EXIT_FAILED, EXIT_INPUT = 0, 1, 2
EXIT_INTERRUPTED = 130  # what shells give a command that SIGINT ended


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """Calls `main(argv)` and leaves with its exit code (None counts as 0).

    An `InputError` becomes `error: MESSAGE` on stderr and exit code 2; Ctrl-C, where a command does not take it for a
    request, exit code 130. Any other exception keeps its traceback and
    Python's exit code 1: it is a defect or a failing machine, and the traceback is what a report needs.
    """
    try:
        code = main(sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_INPUT)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(EXIT_OK if code is None else code)
