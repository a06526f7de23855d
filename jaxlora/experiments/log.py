"""The journal's entries: for each run what it changed, and what came of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxlora.experiments.advice import Case, Rates, advise, tried
from jaxlora.experiments.baseline import baselines, changed_defaults, in_order, model_of, rank_of, unfair
from jaxlora.experiments.changes import differing
from jaxlora.experiments.findings import Finding
from jaxlora.experiments.records import Run
from jaxlora.experiments.verdict import Earlier, Reading, verdict


@dataclass(frozen=True)
class Entry:
    """One run in the journal.

    Attributes:
        run: the run. baseline: what it is compared with, None for none.
        unfair: what makes that comparison unfair: "other data", "other hardware", "jaxlora 0.1 -> 0.2: ...".
        changes: what differs from the baseline, the weightiest first: "learning rate 1e-4 instead of 2e-4".
        hypothesis: what the run was expected to show, "" for nothing.
        verdict: what came of it, the weightiest first.
        advice: one line, "" for none.
        notes: a person's own sentences, then what is wrong with the folder or the choice of the baseline.
    """

    run: Run
    baseline: Run | None
    unfair: tuple[str, ...]
    changes: tuple[str, ...]
    hypothesis: str
    verdict: tuple[Finding, ...]
    advice: str
    notes: tuple[str, ...]


def journal(runs: Sequence[Run], tick: Callable[[], None] = lambda: None) -> list[Entry]:
    """The entries of all runs, by model and rank, each in the order in which they began.

    Models come in the order of their first runs, and so do the ranks of one.

    Args:
        tick: called after each run.
    """
    ordered = in_order(runs)
    readings = {id(run): Reading(run) for run in ordered}
    rates = tried(readings.values())
    entries: list[Entry] = []
    before: dict[str, Earlier] = {}
    for run, (baseline, told) in zip(ordered, baselines(ordered), strict=True):
        new, old = readings[id(run)], readings[id(baseline)] if baseline else None
        earlier = before.setdefault(model_of(run), Earlier(len(ordered)))
        entries.append(_entry(new, old, earlier, told, rates.get(str(run.path))))
        earlier.add(new.curve)
        tick()
    return _grouped(entries)


def compare(new: Run, old: Run) -> Entry:
    """The entry of a run against one that is named, whatever its own baseline is."""
    return _entry(Reading(new), Reading(old), None, "", None)


def _entry(
    new: Reading, old: Reading | None, earlier: Earlier | None, told: str, rates: Rates | None
) -> Entry:
    run = new.run
    changes = tuple(differing(old.run, run)) if old else ()
    if old:
        by_default = set(changed_defaults(old.run, run))
        changes = tuple(change for change in changes if change.key not in by_default)
    found = verdict(new, old, earlier)
    first = {finding.kind: finding for finding in reversed(found)}
    hypothesis = str(run.config.get("journal.hypothesis") or run.record.get("hypothesis") or "")
    return Entry(
        run=run,
        baseline=old.run if old else None,
        unfair=tuple(unfair(old.run, run)) if old else (),
        changes=tuple(change.text for change in changes),
        hypothesis=hypothesis,
        verdict=found,
        advice=advise(Case(new, old, changes, first, rates)),
        notes=(*run.notes, *run.problems, *([told] if told else [])),
    )


def _grouped(entries: Sequence[Entry]) -> list[Entry]:
    models: dict[str, dict[int | None, list[Entry]]] = {}
    for entry in entries:
        ranks = models.setdefault(model_of(entry.run), {})
        ranks.setdefault(rank_of(entry.run), []).append(entry)
    return [entry for ranks in models.values() for group in ranks.values() for entry in group]
