"""What was written down by hand about eighteen runs, and what the journal writes about runs that went like them.

python tests/experiments/notebook.py > docs/journal-notebook.md
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

WRITTEN = {
    "Nov22_10-57": "fastest train loss decrease so far (train falls to 0.7, eval stays near 1.5)",
    "Nov22_14-28": "slightly slower convergence, no improvement in eval loss",
    "Nov22_18-58": "even slower convergence, no improvement in eval loss",
    "Nov22_21-31": "much slower training, much higher eval loss (0.1 is too high)",
    "Nov22_22-20": "very similar to Nov22_18-58: higher weight decay has no effect",
    "Nov23_15-59": "no improvement in eval loss",
    "Nov23_19-53": "has a loss spike",
    "Nov23_21-37": "trains slowly but steadily, may reach a lower eval loss",
    "Nov23_23-30": "trains slower",
    "Nov24_23-30": "trains faster but risks diverging",
    "Nov25_09-19": "converges slower, less good eval loss",
    "Nov25_12-25": "trains well; the difference to the first run may be the lower rank",
    "Nov22_23-06": "healthy: train 0.88, eval about 1.2; a few epochs are enough, but stopping must be more granular "
    "to get the best model",
    "Nov23_08-13": "train 0.67, eval 1.21: a larger rank does not help",
    "Nov24_02-27": "converges slower, but trains well",
    "Nov24_22-17": "diverges",
    "Nov24_10-49": "seems to train well",
    "Nov25_02-30": "converges faster, but stops very early",
}
"""Name -> what was written down about it."""

HEAD = """# The notebook, by hand and by the journal

On the left what one person wrote down about eighteen runs (`configs/notebook.py`); on the right what the journal says
of runs that went like them. Those runs' curves were not kept: the ones that the journal read here are invented
(`tests/experiments/invented.py`), each so that it shows what was written down about it. Made by `python
tests/experiments/notebook.py > docs/journal-notebook.md`; `tests/experiments/test_notebook.py` holds it to that.

| run | changed | by hand | by the journal |
| --- | --- | --- | --- |
"""


def entries():
    """The journal's entries of the eighteen invented runs."""
    from jaxlora.experiments.log import journal
    from jaxlora.experiments.records import find_runs, read_run
    from tests.experiments.invented import notebook

    with tempfile.TemporaryDirectory() as folder:
        notebook(Path(folder))
        return journal([read_run(path) for path in find_runs([folder])])


def page(found) -> str:
    """The page in docs/."""
    rows = []
    for entry in found:
        name, changed = entry.run.name, "; ".join(entry.changes) or "baseline"
        if entry.hypothesis:
            changed += f" (hypothesis: {entry.hypothesis})"
        verdict = "; ".join(finding.text for finding in entry.verdict)
        advice = f" **Advice:** {entry.advice}" if entry.advice else ""
        rows.append(f"| {name} | {changed} | {WRITTEN[name]} | {verdict}.{advice} |\n")
    return HEAD + "".join(rows)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    print(page(entries()), end="")
