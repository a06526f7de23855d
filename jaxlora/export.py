"""Hand on what was trained: python -m jaxlora.export --run runs/NAME --to merged --out FOLDER"""

import os
import re
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxlora.config.build import chosen
from jaxlora.config.load import CommandParser
from jaxlora.core import cli
from jaxlora.core.errors import InputError

if TYPE_CHECKING:  # what is slow to import is imported where it is used, so that --help answers at once
    from jaxlora.runs.card import Export
    from jaxlora.runs.progress import Progress

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def main(argv: Sequence[str]) -> int:
    arguments = _parse(argv)
    try:
        return _export(arguments)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return cli.EXIT_INTERRUPTED


def _parse(argv: Sequence[str]) -> Namespace:
    parser = CommandParser(
        prog="python -m jaxlora.export",
        description="Export an adapter: as a PEFT folder, or merged into its base as a Hugging Face model.",
    )
    chosen.add_arguments(parser, dtype=False)
    parser.add_argument(
        "--to", required=True, choices=("peft", "merged"), help="an adapter folder, or a whole model"
    )
    parser.add_argument("--out", required=True, type=Path, help="the folder to make; not there yet, or empty")
    parser.add_argument(
        "--max-shard-size", default="5GB", help="with --to merged: a file of weights, such as 500MB (5GB)"
    )
    arguments = parser.parse_args(argv)
    if arguments.run is None and arguments.adapter is None:
        raise InputError("an export needs an adapter: name it with --run FOLDER or --adapter FOLDER.")
    arguments.max_shard_size = _size(arguments.max_shard_size)
    arguments.out = _new(arguments.out)
    return arguments


def _size(text: str) -> int:
    """ "5GB" -> 5,000,000,000, as transformers counts."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]B)", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise InputError(f"--max-shard-size {text} must be a size such as 5GB or 500MB.")
    return size


def _new(out: Path) -> Path:
    """The folder that can be renamed into, absolute."""
    folder = out.resolve()
    if not folder.exists():
        return folder
    if not folder.is_dir():
        raise InputError(f"--out {out} is a file; name a folder that is not there yet.")
    there = sorted(entry.name for entry in folder.iterdir())
    if there:
        shown = ", ".join(there[:3]) + (", ..." if len(there) > 3 else "")
        raise InputError(
            f"--out {out} is not empty (it has {shown}): name a folder that is not there yet, or empty."
        )
    if os.path.ismount(folder) or folder == Path.cwd():
        raise InputError(
            f"--out {out} cannot be replaced while it is in use: name a folder inside it, such as {out / 'model'}."
        )
    return folder


def _export(arguments: Namespace) -> int:
    from jaxlora.runs.progress import Progress

    source = chosen.choose(arguments)
    merged, out = arguments.to == "merged", arguments.out
    with Progress() as progress:
        with progress.stage("reading the adapter"):
            from jaxlora.config.build import exporting
            from jaxlora.lora.merged import write_merged
            from jaxlora.lora.peft import save_peft
            from jaxlora.runs.card import Export, model_card
            from jaxlora.runs.files import new_folder

            files, spec = exporting.base(source, weights=merged)
            if not source.averaged:
                adapter, lora = exporting.adapter(source, files, spec)
        nll = None
        if source.averaged:
            adapter, lora, nll = exporting.averaged(source, progress)
        export = Export(
            merged,
            files.name,
            files.revision,
            lora,
            source.run,
            source.step,
            str(source.folder or ""),
            source.averaged,
            nll,
        )
        progress.say(f"exporting {source.description}")
        try:
            with new_folder(out) as aside:
                if merged:
                    with progress.stage("merging") as stage:
                        write_merged(files, spec, adapter, lora, aside, arguments.max_shard_size, stage)
                else:
                    save_peft(aside, adapter, lora, files.name, files.revision)
                (aside / "README.md").write_text(model_card(export, out.name), encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"{out} could not be written ({error.strerror or error}); what was begun is removed. "
                "Make room, or give another --out."
            ) from error
        _tell(export, out, progress)
    return cli.EXIT_OK


def _tell(export: "Export", out: Path, progress: "Progress") -> None:
    """Where it is, how large, and how to load it."""
    from jaxlora.models.shards import gigabytes
    from jaxlora.runs.card import averaged_nll, transformers_code, vllm_command, vllm_refusal

    sizes = [file.stat().st_size for file in out.rglob("*") if file.is_file()]
    path = str(out)
    served = vllm_command(export, shlex.quote(path))
    which = f"--{'model' if export.merged else 'adapter'} {shlex.quote(path)}"
    code = [line for line in transformers_code(export, path) if line]
    rows = [
        ("folder", path),
        ("size", f"{gigabytes(sum(sizes))} in {len(sizes)} files"),
        *([("eval nll", told)] if (told := averaged_nll(export)) else []),
        ("try it", f"python -m jaxlora.generate {which}"),
        *zip(("transformers", *[""] * len(code)), code, strict=False),
        ("vLLM", served or vllm_refusal(export)),
    ]
    progress.table("exported", rows)


if __name__ == "__main__":
    cli.run(main)
