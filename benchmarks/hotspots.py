"""Where the time of our train step goes: its instructions by the time that threads spend in them, from a trace.

    python -m benchmarks.hotspots
    python -m benchmarks.hotspots --shapes 0.5B --remat dots --top 40

For a CPU, where xprof's tables are empty and its trace viewer alone shows something (docs/profile.md). A round is a
step that is traced, after warm ones; to be traced costs time, so this is no measure of speed. An instruction's time is
what its threads spent in it and in nothing that it called; of two that run side by side, both count. The name is that
of the code that it was compiled from.
"""

import collections
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks import commands, report
from benchmarks.ours import OurStep, filled, random_base
from benchmarks.shapes import spec

_MADE = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (\S+) ")
_PASSES = (("rematted_computation", "again"), ("transpose(", "backward"))
_PARTS = ("self_attn", "mlp", "layernorm", "jvp()")  # the last one is the loss


class Spot(NamedTuple):
    """An instruction of the program.

    Attributes:
        seconds: of all threads. count: how often it ran.
        result: its type and shape. source: the name that JAX gave the code, of its pass and part.
    """

    seconds: float
    count: int
    result: str
    source: str

    @property
    def kind(self) -> str:
        """Pass, part, and whether it multiplies matrices: "backward mlp products"."""
        turn = next((told for mark, told in _PASSES if mark in self.source), "forward")
        part = next((part for part in _PARTS if part in self.source), "other")
        return f"{turn} {'loss' if part == 'jvp()' else part} {'products' if '->' in self.source else 'else'}"


def own_times(events: Iterable[tuple[str, float, float]]) -> collections.Counter[str]:
    """Time by name of one thread's events, without what lies within them.

    Args:
        events: name, start and end of each; two either lie apart or one within the other.
    """
    own: collections.Counter[str] = collections.Counter()
    open_: list[tuple[str, float]] = []
    for name, start, end in sorted(events, key=lambda event: (event[1], -event[2])):
        while open_ and open_[-1][1] <= start:
            open_.pop()
        if open_:
            own[open_[-1][0]] -= end - start
        own[name] += end - start
        open_.append((name, end))
    return own


def hotspots(trace: Path, program: str) -> list[Spot]:
    """The instructions of a program in a trace, the slowest first.

    Args:
        trace: an `.xplane.pb`.
        program: its text.
    """
    made: dict[str, tuple[str, str]] = {}
    for line in program.splitlines():
        if match := _MADE.match(line):
            source = re.search(r'op_name="([^"]*)"', line)
            made.setdefault(match[1], (match[2], source[1] if source else ""))
    own: collections.Counter[str] = collections.Counter()
    count: collections.Counter[str] = collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for thread in plane.lines:
            events = [(e.name, e.start_ns, e.start_ns + e.duration_ns) for e in thread.events]
            own.update(own_times(events))
            count.update(name for name, *_ in events)
    return [Spot(time / 1e9, count[name], *made[name]) for name, time in own.most_common() if name in made]


def measure(shape: str, remat: str, arguments: Any) -> list[Spot]:
    """Traces as many steps as there are rounds."""
    base, rows, length = spec(shape), arguments.rows, arguments.length
    ours = OurStep(base, rows, length, arguments.dtype, remat, scan_layers=arguments.scan_layers)
    assert ours.compiled is not None
    step, batch = (
        ours.starter(random_base(base, arguments.dtype)),
        ours.put(filled(rows, length, base.vocab_size)),
    )
    for _ in range(2):
        jax.block_until_ready(step(batch))
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(arguments.rounds):
                jax.block_until_ready(step(batch))
        (trace,) = Path(folder).glob("plugins/profile/*/*.xplane.pb")
        return hotspots(trace, ours.compiled.as_text() or "")


def by_kind(spots: Iterable[Spot]) -> dict[str, float]:
    """Seconds by `Spot.kind`, the most first."""
    found: collections.Counter[str] = collections.Counter()
    for spot in spots:
        found[spot.kind] += spot.seconds
    return dict(found.most_common())


def tell(title: str, spots: list[Spot], kinds: Mapping[str, float], top: int) -> None:
    print(f"\n{title}")
    whole = sum(kinds.values())
    shares = [(name, f"{1e3 * s:,.1f}", f"{s / whole:.1%}") for name, s in kinds.items()]
    report.table(("part of the step", "ms", "share"), shares)
    print()
    rows = [
        (f"{1e3 * spot.seconds:7,.1f}  {spot.result.split('{')[0]}  {spot.source[-70:]}", str(spot.count))
        for spot in spots[:top]
    ]
    report.table(("     ms  result, and where it comes from", "times"), rows)


def main() -> None:
    parser = commands.parser(__doc__, rounds=1)
    commands.add_step(parser, "135M")
    parser.add_argument("--top", type=commands.positive, default=20, help="instructions to name (20)")
    arguments = commands.step_arguments(parser)
    told, where, results = report.Report("hotspots", arguments), report.device(), {}
    for shape in arguments.shapes:
        for remat in arguments.remat:
            title = f"{shape}, {arguments.rows} x {arguments.length}, {arguments.dtype}, remat {remat}"
            spots = measure(shape, remat, arguments)
            kinds = by_kind(spots)
            results[title] = {
                "seconds_by_kind": kinds,
                "spots": [spot._asdict() for spot in spots[: arguments.top]],
            }
            tell(f"{title}, {where}", spots, kinds, arguments.top)
    told.write(where, ("jax", "jaxlib", "flax"), results)


if __name__ == "__main__":
    main()
