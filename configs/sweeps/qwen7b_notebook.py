"""The notebook's four runs of Qwen2.5-7B-Instruct (Apache-2.0), in one command.

    python -m jaxlora.sweep --config configs/sweeps/qwen7b_notebook.py --workdir runs/qwen7b_notebook

configs/notebook.py says what each is, and what came of it then; each keeps its name. All four may be one stack.

Your own data: put it in DATA of configs/notebook.py.

Hardware: that of configs/qwen7b.py; the base of 15 GB is split over all devices, once for the four.
"""

from pathlib import Path

from jaxlora.config.sweep import of_configs

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebook.py"
# Its data's licence: # Apache-2.0.
RUNS = ("Nov22_23-06", "Nov23_08-13", "Nov24_02-27", "Nov24_22-17")


def get_config():
    return of_configs({run: f"{NOTEBOOK}:{run}" for run in RUNS})
