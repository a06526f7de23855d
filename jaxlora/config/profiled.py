"""Which steps of a run a person wants to see traced."""

import re

from jaxlora.core.errors import InputError

_FORM = "Give it as START:END, the first and the last step to trace, for example --profile 10:12."


def steps_of(text: str) -> range:
    """The steps that a person named.

    Args:
        text: "START:END", both counted from 1, both included.
    Raises:
        InputError: another form, a step below 1, or an end before the start.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None:
        raise InputError(f"--profile {text} is no range of steps.\n{_FORM}")
    first, last = int(match[1]), int(match[2])
    if not 1 <= first <= last:
        what = "steps count from 1" if first < 1 else "the end is before the start"
        raise InputError(f"--profile {text}: {what}.\n{_FORM}")
    return range(first, last + 1)


def check_ahead(steps: range, done: int, total: int) -> None:
    """Refuses steps that the run will not make.

    Args:
        steps: to trace; where there are none, all is well.
        done: steps made before.
        total: the run's last step.
    Raises:
        InputError: some are past the run's end, or all were made before.
    """
    if not steps:
        return
    named, ahead = f"--profile {steps[0]}:{steps[-1]}", f"{done + 1} to {total}"
    length = min(len(steps), total - done)
    instead = f"Give steps from {ahead}, for example --profile {total - length + 1}:{total}."
    if steps[-1] > total:
        raise InputError(f"{named} goes past the end: the run's last step is {total}.\n{instead}")
    if steps[-1] <= done:
        raise InputError(f"{named}: the run goes on after step {done}, these were made before.\n{instead}")
