"""A person's own sentences about a run."""

import json
import time
from pathlib import Path

from jaxlora.core.errors import InputError
from jaxlora.experiments.records import NOTES


def append(folder: Path, text: str, now: time.struct_time | None = None) -> None:
    """Adds a sentence to the folder's notes.jsonl, from where `records` and a run that goes on take it.

    Args:
        folder: of a run, of whatever format.
        text: what to say; line breaks become spaces.
        now: universal time; the present by default.
    Raises:
        InputError: an empty text, or a folder that cannot be written.
    """
    sentence = " ".join(text.split())
    if not sentence:
        raise InputError('the note is empty: give a sentence, such as note runs/NAME "too high a rate".')
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", now or time.gmtime()), "text": sentence}
    content = (json.dumps(line, ensure_ascii=False) + "\n").encode()
    try:
        with (folder / NOTES).open("ab", buffering=0) as stream:  # one write, so that two notes never mix
            stream.write(content)
    except OSError as error:
        raise InputError(
            f"the note cannot be written to {folder / NOTES} ({error.strerror or error}): make the folder writable."
        ) from error
