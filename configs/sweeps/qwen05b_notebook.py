"""The notebook's twelve runs of Qwen2.5-0.5B-Instruct (Apache-2.0), in one command.

    python -m jaxlora.sweep --config configs/sweeps/qwen05b_notebook.py --workdir runs/qwen05b_notebook

configs/notebook.py says what each is, and what came of it then; each keeps its name. Nine of them may be one stack:
learning rates, decays, smoothing, epochs and ranks (of 16 and 128) are numbers to the program. Two have a batch of 64
and one shuffles its data: they make two groups more, over the same base.

Your own data: put it in DATA of configs/notebook.py.

Hardware: one accelerator of 24 GB or more, by an estimate as in qwen05b_lr.py with 0.8 GB for each adapter of rank 128;
where less fits, fewer are trained at a time.
"""

from pathlib import Path

from jaxlora.config.sweep import of_configs

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebook.py"
# Its data's licence: # Apache-2.0.
RUNS = (
    "Nov22_10-57", "Nov22_14-28", "Nov22_18-58", "Nov22_21-31", "Nov22_22-20", "Nov23_15-59",
    "Nov23_19-53", "Nov23_21-37", "Nov23_23-30", "Nov24_23-30", "Nov25_09-19", "Nov25_12-25",
)  # fmt: skip


def get_config():
    return of_configs({run: f"{NOTEBOOK}:{run}" for run in RUNS})
