"""A model card: what was exported, what it was trained on and how, what came of it, and how to load it."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jaxlora
from jaxlora.config.schema import KEYS
from jaxlora.lora.spec import LoraSpec
from jaxlora.runs.directory import RunDirectory

MOST_ROWS = 15
"""Evaluations in a card's table."""

_ALWAYS = (
    "lora.rank", "lora.alpha", "lora.targets", "optim.learning_rate", "train.batch_size", "train.epochs", "seed",
)  # fmt: skip
_ELSEWHERE = ("model.path", "model.revision", "data.train", "data.eval")
# What vLLM's --max-lora-rank may be (vllm/config/lora.py, MaxLoRARanks). It refuses DoRA (vllm/lora/peft_helper.py).
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclasses.dataclass(frozen=True)
class Export:
    """What a card describes.

    Attributes:
        merged: whether the adapter is merged into the base, or stands beside it.
        base: its name: hub id or folder.
        revision: its commit on the hub; "" for a local folder.
        spec: the adapter's constants, as exported.
        run: where the adapter comes from; None for an adapter of unknown origin.
        step: the step of the run that it is from; None when unknown.
        source: the adapter's folder, where there is no run.
        averaged: the steps of the run that it is the mean of, the best first; () for a single one.
        nll: eval nll of that mean.
    """

    merged: bool
    base: str
    revision: str
    spec: LoraSpec
    run: RunDirectory | None = None
    step: int | None = None
    source: str = ""
    averaged: tuple[int, ...] = ()
    nll: float | None = None


def transformers_code(export: Export, folder: str) -> list[str]:
    """Lines of Python that load what lies in the folder."""
    if export.merged:
        return [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained({_quoted(folder)}, dtype="auto")',
            f"tokenizer = AutoTokenizer.from_pretrained({_quoted(folder)})",
        ]
    base = _quoted(export.base)
    at = f", revision={_quoted(export.revision)}" if export.revision else ""
    return [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'base = AutoModelForCausalLM.from_pretrained({base}{at}, dtype="auto")',
        f"model = PeftModel.from_pretrained(base, {_quoted(folder)})",
        f"tokenizer = AutoTokenizer.from_pretrained({base}{at})",
    ]


def vllm_command(export: Export, folder: str) -> str | None:
    """The command that serves what lies in the folder with vLLM; None where vLLM cannot."""
    if export.merged:
        return f"vllm serve {folder}"
    rank = next((rank for rank in _VLLM_RANKS if rank >= export.spec.rank), None)
    if export.spec.use_dora or rank is None:
        return None
    at = f" --revision {export.revision}" if export.revision else ""
    return (
        f"vllm serve {export.base}{at} --enable-lora --max-lora-rank {rank} --lora-modules adapter={folder}"
    )


def vllm_refusal(export: Export) -> str:
    """Why there is no `vllm_command`, and what to do."""
    reason = "DoRA adapters" if export.spec.use_dora else f"a rank above {_VLLM_RANKS[-1]}"
    return f"vLLM does not load {reason}: export with --to merged for it"


def averaged_nll(export: Export) -> str:
    """ "1.2345 (the mean of steps 400, 300); 1.2400 (the best alone, step 400)"; "" where nothing was averaged."""
    if export.nll is None or export.run is None:
        return ""
    best = export.run.record.get("best") or {}
    alone = best.get("eval/nll")
    told = f"{export.nll:.4f} (the mean of steps {', '.join(f'{step:,}' for step in export.averaged)})"
    return told if alone is None else f"{told}; {alone:.4f} (the best alone, step {best['step']:,})"


def model_card(export: Export, name: str) -> str:
    """The README.md of an exported folder, in Markdown with the hub's YAML header.

    Args:
        export: what it describes.
        name: of the folder, by which the card's commands call it.
    """
    base = f"`{export.base}`" + (f" at revision `{export.revision}`" if export.revision else "")
    title = export.run.name if export.run else name
    what = (
        f"{base} with a LoRA adapter merged in: added in float32, and rounded once to the base's own dtype."
        if export.merged
        else f"A LoRA adapter for {base}."
    )
    blocks = [
        _header(export),
        f"# {title}",
        f"{what} Made with jaxlora {jaxlora.__version__}.",
        _adapter(export),
        *(_of_run(export, export.run) if export.run else [f"It was exported from `{export.source}`."]),
        *_how_to_load(export, name),
    ]
    return "\n\n".join(filter(None, blocks)) + "\n"


def _header(export: Export) -> str:
    lines = ["---"]
    if export.revision:  # a folder on somebody's disk is no name that the hub accepts
        lines.append(f"base_model: {_quoted(export.base)}")
    lines += [
        f"library_name: {'transformers' if export.merged else 'peft'}",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {tag}" for tag in ("lora", *(("dora",) if export.spec.use_dora else ()), "jaxlora")),
        "---",
    ]
    return "\n".join(lines)


def _adapter(export: Export) -> str:
    spec = export.spec
    kind = "DoRA" if spec.use_dora else "rsLoRA" if spec.scaling == "rslora" else "LoRA"
    told = (
        f"{kind}, rank {spec.rank}, alpha {spec.alpha:g} (scale {spec.scale:g}) on {', '.join(spec.targets)}"
    )
    trained = export.run.config["lora"]["rank"] if export.run else spec.rank
    widened = (
        "" if trained == spec.rank else "; PiSSA's start and ranks by module are in it, as one larger rank"
    )
    return f"Adapter: {told}{widened}."


def _of_run(export: Export, run: RunDirectory) -> list[str]:
    record = run.record
    best = (record.get("best") or {}).get("step")
    at = (
        ""
        if export.step is None
        else f" at step {export.step:,}" + (" (the best)" if export.step == best else "")
    )
    facts = [
        f"{record['steps']:,} steps" if record.get("steps") else "",
        f"{record['tokens']:,} trained tokens" if record.get("tokens") else "",
        f"{record['seconds']:,.0f} s on {record['devices']}"
        if record.get("seconds") and "devices" in record
        else "",
        record.get("status", "not begun").replace("_", " "),
    ]
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    which = f"the adapter of run `{run.name}`{at}"
    if export.averaged:
        steps = ", ".join(f"{step:,}" for step in export.averaged)
        which = f"the mean of the adapters of run `{run.name}` at its best evaluations (steps {steps})"
    averaged = averaged_nll(export)
    return [
        f"It is {which}. The run: {', '.join(filter(None, facts))}.",
        *((f"Its nll on the run's held-out data: {averaged}.",) if averaged else ()),
        "## Data",
        _data(run),
        "## Settings",
        "What differs from jaxlora's defaults, and the usual numbers:",
        _table(("key", "value"), _settings(run.config)),
        *_curve(export, run, best),
        *(("## Versions", f"Trained with {versions}.") if versions else ()),
    ]


def _data(run: RunDirectory) -> str:
    chosen, counted = run.config.get("data", {}), run.record.get("data", {})
    rows = []
    for name in ("train", "eval"):
        sources = chosen.get(name) or "held out of the training data"
        found = counted.get(name, {})
        counts = (f"{found[key]:,}" if key in found else "" for key in ("examples", "trained_tokens"))
        told = ", ".join(_code(s) for s in ([sources] if isinstance(sources, str) else sources))
        rows.append(
            (name, told if chosen.get(name) else sources, *counts, _code(found.get("fingerprint", "")))
        )
    return _table(("", "source", "examples", "trained tokens", "fingerprint"), rows)


def _settings(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The keys that a reader wants to know, with their values."""
    rows = []
    for path, key in KEYS.items():
        section, _, name = path.rpartition(".")
        values = config.get(section, {}) if section else config
        if name not in values or path in _ELSEWHERE:
            continue
        value = tuple(values[name]) if isinstance(values[name], list) else values[name]
        if path in _ALWAYS or value != key.default:
            shown = ", ".join(map(str, value)) if isinstance(value, tuple) else value
            rows.append((_code(path), _code(f"{shown:g}" if isinstance(shown, float) else str(shown))))
    return rows


def _curve(export: Export, run: RunDirectory, best: int | None) -> list[str]:
    lines = {line["step"]: line for line in run.metrics() if "eval/nll" in line}
    if not lines:
        return []
    names = [
        name
        for name in dict.fromkeys(name for line in lines.values() for name in line)
        if name.startswith("eval/") and not name.endswith("/nonfinite")
    ]
    marks = {best: ["best"]}
    marks.setdefault(export.step, []).append("exported")
    for step in export.averaged:
        marks.setdefault(step, []).append("averaged")
    rows = [
        (f"{step:,}", *(_number(lines[step], name) for name in names), ", ".join(marks.get(step, ())))
        for step in thinned(sorted(lines), {best, export.step, *export.averaged})
    ]
    return ["## Evaluation", "On the held-out data, eval/nll in nats per trained token:",
            _table(("step", *names, ""), rows)]  # fmt: skip


def thinned(steps: Sequence[int], kept: Iterable[int | None], most: int = MOST_ROWS) -> list[int]:
    """At most so many of the steps, spread evenly, with the first, the last and those to be kept."""
    needed = {steps[0], steps[-1], *(step for step in kept if step in steps)}
    others = [step for step in steps if step not in needed]
    room = most - len(needed)
    if len(others) > room:
        others = [others[(2 * i + 1) * len(others) // (2 * room)] for i in range(room)]
    return sorted(needed | set(others))


def _number(line: Mapping[str, Any], name: str) -> str:
    value = line.get(name)
    if value is None:
        return str(line.get(f"{name}/nonfinite", ""))
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _how_to_load(export: Export, name: str) -> list[str]:
    command = vllm_command(export, name)
    served = f"```sh\n{command}\n```" if command else vllm_refusal(export) + "."
    return ["## How to load", "\n".join(["```python", *transformers_code(export, name), "```"]), served]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _quoted(text: str) -> str:
    """As a string of Python, YAML or JSON."""
    return json.dumps(text, ensure_ascii=False)
