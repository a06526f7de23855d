"""The journal's entries: for each run what it changed, and what came of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jaxlora.experiments.records import Run


@dataclass(frozen=True)
class Finding:
    """One thing that a run's curves say.

    Attributes:
        kind: "convergence", "spike", "divergence", "risk", "overfitting", "early_stop", "plateau", "unfinished",
            "undertrained", "eval", "steady" or "data" (what they do not carry).
        text: in a person's words.
        numbers: what it rests on, by name.
    """

    kind: str
    text: str
    numbers: Mapping[str, float] = field(default_factory=dict)


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
        notes: a person's own sentences, and what is wrong with the folder.
    """

    run: Run
    baseline: Run | None
    unfair: tuple[str, ...]
    changes: tuple[str, ...]
    hypothesis: str
    verdict: tuple[Finding, ...]
    advice: str
    notes: tuple[str, ...]


def journal(runs: Sequence[Run]) -> list[Entry]:
    """The entries of all runs, by model and rank, each in the order in which they began."""
    raise NotImplementedError
