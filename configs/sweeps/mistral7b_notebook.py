"""The notebook's two runs of Mistral-7B-Instruct-v0.3 (Apache-2.0), in one command.

    python -m jaxlora.sweep --config configs/sweeps/mistral7b_notebook.py --workdir runs/mistral7b_notebook

configs/notebook.py says what each is, and what came of it then; each keeps its name. Both are one stack.

Your own data: put it in DATA of configs/notebook.py.

Hardware: that of configs/mistral7b.py; the base of 15 GB is split over all devices, once for both.
"""

from pathlib import Path

from jaxlora.config.sweep import of_configs

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebook.py"
# Its data's licence: # Apache-2.0.
RUNS = ("Nov24_10-49", "Nov25_02-30")


def get_config():
    return of_configs({run: f"{NOTEBOOK}:{run}" for run in RUNS})
